"""`FusedLoraLayer`: what the LoRA layers of every type share: the frozen weight, the two factors, merging and `state_dict`."""

import math
import warnings
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastlora import validation


class FusedLoraLayer(nn.Module):
    """A frozen weight W and bias, and an update of W by two trainable factors A and B of rank r.

    scaling = lora_alpha / r, or lora_alpha / √r with `use_rslora`.  With r = 0 there are no factors.

    A new type of layer is a subclass with `from_module`, `delta_weight`, `plain_module`, `reset_lora_parameters` and forward,
    and an entry in `fastlora.injection.layer_types`.

    Attributes:
        weight, bias (or None): as in the module that was wrapped.  merged: whether weight holds the update.
    """

    #: The parameters A and B, each with its key in PEFT's files.
    FACTORS: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    use_dora = False
    bias: nn.Parameter | None
    _base_weight: Tensor | None

    def _register(
        self,
        weight: Tensor,
        bias: Tensor | None,
        factor_shapes: tuple[tuple[int, ...], tuple[int, ...]],
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        merge_weights: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Check the options that all layers share, and become a module with this weight and bias and new A and B."""
        validation.check_tensor(weight, "weight")
        adapter_dtype = adapter_dtype or weight.dtype
        validation.check_dtype(adapter_dtype, "adapter_dtype")
        validation.check_adapter_dtype(adapter_dtype, weight.dtype, "weight")
        validation.check_dropout_p(lora_dropout, "lora_dropout")
        validation.check_number(lora_alpha, "lora_alpha")
        validation.check_flag(use_rslora, "use_rslora")
        validation.check_flag(use_dora, "use_dora")
        if use_dora:
            raise ValueError(f"use_dora=True is for linears, not for a {type(self).__name__}")
        validation.check_flag(merge_weights, "merge_weights")
        super().__init__()
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.merge_weights, self.merged = merge_weights, False
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.factor_shapes = factor_shapes
        self.weight = self._frozen(weight)
        self.register_parameter("bias", None if bias is None else self._frozen(bias))
        self.register_buffer("_base_weight", None, persistent=False)
        for name, shape in zip(self.FACTORS, factor_shapes, strict=True):
            factor = nn.Parameter(torch.empty(shape, device=weight.device, dtype=adapter_dtype)) if r else None
            self.register_parameter(name, factor)
        if r:
            self.reset_lora_parameters()

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module, r: int, lora_alpha: float, lora_dropout: float, **options: Any) -> Self:
        """Wrap `module`: weight and bias share the storage of its, and the training mode is kept."""

    @abstractmethod
    def reset_lora_parameters(self) -> None:
        """Draw the factor that starts random, and set the other to zero."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The update of the weight, in float32 (float64 for float64 factors); zero for r = 0."""

    @abstractmethod
    def plain_module(self) -> nn.Module:
        """A module of the type that was wrapped, on the meta device."""

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """(A, B); () for r = 0."""
        return tuple(getattr(self, name) for name in self.FACTORS) if self.r else ()

    def trained(self) -> dict[str, str]:
        """The parameters of the adapter, each with its key in PEFT's files below the name of the layer; {} for r = 0."""
        return dict(self.FACTORS) if self.r else {}

    def _adapts(self) -> bool:
        """Whether forward adds the update to what the weight gives.  Warns of a merged layer in training."""
        untrained = self.merged and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if untrained and any(factor.requires_grad for factor in self.factors):
            warnings.warn(
                "a merged LoRA layer runs in training mode: its adapter gets no gradient, call unmerge() before training",
                stacklevel=3,
            )
        return bool(self.r) and not self.merged

    def train(self, mode: bool = True) -> Self:
        """Set the mode; with merge_weights, unmerge for training and merge for evaluation."""
        if self.merge_weights and mode == self.merged:
            self.unmerge() if mode else self.merge()
        return super().train(mode)

    def unmergeable_reason(self) -> str | None:
        """Why no weight of this layer's form holds the update, or None where one does."""
        return None

    def _delta(self) -> Tensor:
        """`delta_weight` in the layout of weight."""
        return self.delta_weight()

    def merged_weight(self) -> Tensor:
        """W with the update, of a layer that is not merged: in W's layout, summed in float32 and rounded once to W's dtype."""
        base, delta = self.weight.detach(), self._delta()
        return (base.to(delta.dtype) + delta).to(base.dtype)

    def merge(self, keep_base: bool = True) -> None:
        """Fold the update into the weight, see `merged_weight`.

        The merged weight is a new tensor: other modules that share W's storage keep the base weight.  With keep_base the base
        weight is kept aside and `unmerge` restores it bit for bit; without, it is dropped and `unmerge` refuses.

        Raises:
            RuntimeError: the layer is merged already, or cannot be.
        """
        if self.merged:
            raise RuntimeError("merge() on a module that is merged already")
        if reason := self.unmergeable_reason():
            raise RuntimeError(f"merge() is not possible: {reason}")
        merged = self.merged_weight()
        self._base_weight = self.weight.detach() if keep_base else None
        self.weight = self._frozen(merged)
        self.merged = True

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: the layer is not merged, or was merged with keep_base=False.
        """
        if not self.merged:
            raise RuntimeError("unmerge() on a module that is not merged")
        self.weight = self._frozen(self._kept_base())
        self._base_weight = None
        self.merged = False

    def to_plain(self, merged: bool) -> nn.Module:
        """A `plain_module` on the base weight, or with `merged` on the merged one, that shares weight, bias and mode with this.

        A weight that this layer does not hold is made.

        Raises:
            RuntimeError: the base weight was dropped by merge(keep_base=False).
        """
        plain = self.plain_module()
        if merged and not self.merged:
            plain.weight = self._frozen(self.merged_weight())
        else:
            plain.weight = self.weight if merged == self.merged else self._frozen(self._kept_base())
        if "bias" in plain._parameters:
            plain.bias = self.bias  # type: ignore[assignment]  # None where it was
        return plain.train(self.training)

    def _kept_base(self) -> Tensor:
        if self._base_weight is None:
            raise RuntimeError("this needs the base weight, which merge(keep_base=False) dropped")
        return self._base_weight

    @staticmethod
    def _frozen(weight: Tensor) -> nn.Parameter:
        """A new Parameter: a graph that saved the old one for its backward keeps it."""
        return nn.Parameter(weight.detach(), requires_grad=False)

    def to_file(self, name: str, factor: Tensor) -> Tensor:
        """The factor `name` as PEFT's files hold it."""
        return factor

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """The factor `name` out of a file's tensor.  Raises ValueError for one that this layer cannot hold."""
        return tensor

    def of_config(self) -> dict[str, float]:
        """r and lora_alpha as PEFT's config has them for what `to_file` gives."""
        return {"r": self.r, "lora_alpha": self.lora_alpha}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A merged layer saves its base weight or, without it, a zero B, so that what is saved is the same function."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight
        elif self.r:
            destination[prefix + list(self.FACTORS)[1]] = torch.zeros_like(self.factors[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loading into a merged layer replaces the base weight and A, B; the layer is merged again afterwards.

        A layer merged with keep_base=False has no base weight to keep, so that weight and adapter must come together.
        """
        merged, keep_base = self.merged, self._base_weight is not None
        missing = [name for name in ("weight", *self.trained()) if prefix + name not in state_dict]
        if merged and self.r and not keep_base and missing:
            args[-1].append(f"{prefix or 'the module'} was merged with keep_base=False: loading needs {missing} as well")
            return
        if keep_base:
            self.unmerge()
        self.merged = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        if merged:
            self.merge(keep_base)

    def extra_repr(self) -> str:
        """What nn.Module prints between the parentheses, after the sizes."""
        text = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        flags = ("use_rslora", "use_dora", "fan_in_fan_out", "merge_weights", "merged")
        return text + "".join(f", {flag}=True" for flag in flags if getattr(self, flag, False))
