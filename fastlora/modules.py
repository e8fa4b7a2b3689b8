"""`FusedLoraLinear`: a frozen linear with a LoRA bypass, in PEFT's semantics, on the fused operator."""

import math
import warnings
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from fastlora import dora_ops, validation
from fastlora.dora import dora_linear
from fastlora.functional import lora_linear
from fastlora.projections import Projection
from fastlora.sharing import Group, drop, shared


class Options(TypedDict, total=False):
    """What `FusedLoraLinear` and its `from_linear` take by keyword only; each is False, or adapter_dtype None, by default."""

    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    merge_weights: bool
    adapter_dtype: torch.dtype | None


class FusedLoraLinear(nn.Module):
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, W and bias frozen; dropout in training mode only.

    scaling = lora_alpha / r, or lora_alpha / √r with `use_rslora`.  A is drawn from kaiming_uniform(a=√5) and B is zero, so a
    new module computes what its frozen linear does.  r = 0 is the frozen linear, without lora_A and lora_B.

    Args:
        in_features, out_features, bias: as in nn.Linear.  r: rank.  lora_alpha, lora_dropout: as in PEFT.
        use_rslora: scale by 1/√r (Kalajdzievski, "A rank stabilization scaling factor", 2023).
        use_dora: train the length of each row of W + scaling · B A as well, see `fastlora.dora`.
        fan_in_fan_out: weight is stored (in, out), as in transformers' Conv1D.
        merge_weights: merge on `eval()` and unmerge on `train()`, as loralib does.
        dtype, device: of weight and bias.  adapter_dtype: of lora_A and lora_B; default: dtype.  float32 adapters on a
            float16 or bfloat16 base keep float32 gradients without a float32 copy of x.

    Attributes:
        weight (out, in) or, with fan_in_fan_out, (in, out); bias (out,) or None; lora_A (r, in); lora_B (out, r);
        lora_magnitude_vector (out,) with use_dora, else None; scaling; merged.  `state_dict` has the parameters' names as keys
        and describes the same function merged or not.

    Raises:
        TypeError, ValueError: a size, rank, rate or dtype out of range, or a `linear` that cannot be wrapped.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    bias: nn.Parameter | None
    _base_weight: Tensor | None
    _fastlora_group: Group | None = None  # `inject` makes one
    backend: str | None = None  # set it to choose the backend of `lora_linear` for this module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        fan_in_fan_out = options.get("fan_in_fan_out", False)
        validation.check_size(in_features, "in_features")
        validation.check_size(out_features, "out_features")
        validation.check_flag(bias, "bias")
        validation.check_flag(fan_in_fan_out, "fan_in_fan_out")
        validation.check_dtype(dtype or torch.get_default_dtype(), "dtype")
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        weight = base.weight.t().contiguous() if fan_in_fan_out else base.weight
        self._setup(weight.detach(), base.bias, r, lora_alpha, lora_dropout, **options)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, **options: Unpack[Options]
    ) -> Self:
        """Wrap `linear` (nn.Linear, or with fan_in_fan_out a module whose weight is (in, out), such as transformers' Conv1D).

        weight and bias share the storage of `linear`'s, and so its device and dtype; the training mode is kept.  A `linear`
        with an adapter, a parametrisation or hooks is refused: they would be lost.
        """
        weight, bias = validation.check_linear(linear, options.get("fan_in_fan_out", False))
        module = cls.__new__(cls)
        module._setup(weight.detach(), bias, r, lora_alpha, lora_dropout, **options)
        return module.train(linear.training)

    def _setup(
        self,
        weight: Tensor,
        bias: Tensor | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        validation.check_tensor(weight, "weight", 2)
        adapter_dtype = adapter_dtype or weight.dtype
        validation.check_dtype(adapter_dtype, "adapter_dtype")
        out_features, in_features = weight.shape[::-1] if fan_in_fan_out else weight.shape
        validation.check_rank(r, in_features, out_features)
        validation.check_dropout_p(lora_dropout, "lora_dropout")
        validation.check_number(lora_alpha, "lora_alpha")
        validation.check_flag(use_rslora, "use_rslora")
        validation.check_flag(use_dora, "use_dora")
        if use_dora and not r:
            raise ValueError("use_dora=True needs r >= 1, got r=0: DoRA scales a weight with an adapter")
        validation.check_flag(merge_weights, "merge_weights")
        lora_A = torch.empty((r, in_features), device=weight.device, dtype=adapter_dtype)
        lora_B = torch.empty((out_features, r), device=weight.device, dtype=adapter_dtype)
        validation.check_inputs(None, weight.t() if fan_in_fan_out else weight, lora_A, lora_B, bias, None)
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.lora_alpha, self.lora_dropout, self.use_rslora, self.use_dora = lora_alpha, lora_dropout, use_rslora, use_dora
        self.fan_in_fan_out, self.merge_weights, self.merged = fan_in_fan_out, merge_weights, False
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.weight = self._frozen(weight)
        self.register_parameter("bias", None if bias is None else self._frozen(bias))
        self.register_buffer("_base_weight", None, persistent=False)
        self.register_parameter("lora_A", nn.Parameter(lora_A) if r else None)
        self.register_parameter("lora_B", nn.Parameter(lora_B) if r else None)
        self.register_parameter("lora_magnitude_vector", nn.Parameter(lora_B.new_empty(out_features)) if use_dora else None)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A from kaiming_uniform(a=√5), that is uniform(±1/√in), B zero, and the magnitude ‖W‖ of each row."""
        if self.lora_A is not None and self.lora_B is not None:
            if self.in_features:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        """The magnitude that changes nothing: ‖W + scaling · B A‖ of each row."""
        if self.lora_magnitude_vector is not None and self.lora_A is not None and self.lora_B is not None:
            self.lora_magnitude_vector.copy_(dora_ops.DORA_NORM(self._dense_W(), self.lora_A, self.lora_B, self.scaling))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).  A merged module in training warns: its adapter gets no gradient."""
        given = self._projection(x)
        options: Any = {"training": self.training, "backend": self.backend}
        if isinstance(given, Projection):
            y = shared(self, x, given)
            return lora_linear(x, *given[:4], scaling=given.scaling, dropout_p=given.dropout_p, **options) if y is None else y
        drop(self)
        if not self.merged and self.lora_A is not None and self.lora_B is not None and self.lora_magnitude_vector is not None:
            options |= {"scaling": self.scaling, "dropout_p": self.lora_dropout, "magnitude": self.lora_magnitude_vector}
            return dora_linear(x, self._W(), self.lora_A, self.lora_B, self.bias, **options)
        untrained = self.merged and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if untrained and any(p is not None and p.requires_grad for p in (self.lora_A, self.lora_B)):
            warnings.warn(
                "a merged LoRA linear runs in training mode: its adapter gets no gradient, call unmerge() before training",
                stacklevel=2,
            )
        return nn.functional.linear(x, self._W(), self.bias)

    def _projection(self, x: Tensor) -> Projection | str:
        """The operands of a call with x, or why it is none of a plain LoRA linear: see `fastlora.sharing`."""
        if self.merged or self.lora_A is None or self.lora_B is None:
            return "it is merged" if self.merged else "it has rank 0"
        if self.lora_magnitude_vector is not None:
            return "it is DoRA"
        return Projection(self._W(), self.lora_A, self.lora_B, self.bias, self.scaling, self.lora_dropout)

    def _W(self) -> Any:
        """W (out, in) as `lora_linear` takes it: a tensor, or in a subclass a QuantizedWeight."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _dense_W(self) -> Tensor:
        """W (out, in) as a tensor."""
        return cast(Tensor, self._W())

    def train(self, mode: bool = True) -> Self:
        """Set the mode; with merge_weights, unmerge for training and merge for evaluation."""
        if self.merge_weights and mode == self.merged:
            self.unmerge() if mode else self.merge()
        return super().train(mode)

    def delta_weight(self) -> Tensor:
        """scaling · B A, (out, in), in float32 (float64 for float64 adapters)."""
        if self.lora_A is None or self.lora_B is None:
            return torch.zeros((self.out_features, self.in_features), device=self.weight.device)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype)) * self.scaling

    def merged_weight(self) -> Tensor:
        """W + scaling · B A of a module that is not merged, in W's layout, summed in float32 and rounded once to W's dtype."""
        base, delta = self.weight.detach(), self.delta_weight()
        total = base.to(delta.dtype) + (delta.t() if self.fan_in_fan_out else delta)
        return dora_ops.scaled(total, self.lora_magnitude_vector, 0 if self.fan_in_fan_out else 1).to(base.dtype)

    def merge(self, keep_base: bool = True) -> None:
        """Fold the bypass into the weight, see `merged_weight`.

        The merged weight is a new tensor: other modules that share W's storage keep the base weight.  With keep_base the base
        weight is kept aside and `unmerge` restores it bit for bit; without, it is dropped and `unmerge` refuses.

        Raises:
            RuntimeError: the module is merged already.
        """
        if self.merged:
            raise RuntimeError("merge() on a module that is merged already")
        merged = self.merged_weight()
        self._base_weight = self.weight.detach() if keep_base else None
        self.weight = self._frozen(merged)
        self.merged = True

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: the module is not merged, or was merged with keep_base=False.
        """
        if not self.merged:
            raise RuntimeError("unmerge() on a module that is not merged")
        self.weight = self._frozen(self._kept_base())
        self._base_weight = None
        self.merged = False

    def to_linear(self, merged: bool) -> nn.Module:
        """A plain layer on the base weight, or with `merged` on the merged one, that shares weight, bias and mode with this.

        It is an nn.Linear, or with fan_in_fan_out transformers' Conv1D.  A weight that this module does not hold is made.

        Raises:
            RuntimeError: the base weight was dropped by merge(keep_base=False).
        """
        with torch.device("meta"):  # what the constructor draws is thrown away
            if self.fan_in_fan_out:
                from transformers.pytorch_utils import Conv1D

                linear: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        if merged and not self.merged:
            linear.weight = self._frozen(self.merged_weight())
        else:
            linear.weight = self.weight if merged == self.merged else self._frozen(self._kept_base())
        linear.bias = self.bias  # type: ignore[assignment]  # None where it was
        return linear.train(self.training)

    def _kept_base(self) -> Tensor:
        if self._base_weight is None:
            raise RuntimeError("this needs the base weight, which merge(keep_base=False) dropped")
        return self._base_weight

    @staticmethod
    def _frozen(weight: Tensor) -> nn.Parameter:
        """A new Parameter: a graph that saved the old one for its backward keeps it."""
        return nn.Parameter(weight.detach(), requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A merged module saves its base weight or, without it, a zero B, so that what is saved is the same function."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight
        elif self.lora_B is not None:
            destination[prefix + "lora_B"] = torch.zeros_like(self.lora_B)
            if self.lora_magnitude_vector is not None:
                lengths = dora_ops.squares(self._dense_W()).sqrt()
                destination[prefix + "lora_magnitude_vector"] = lengths.to(self.lora_magnitude_vector.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loading into a merged module replaces the base weight and A, B; the module is merged again afterwards.

        A module merged with keep_base=False has no base weight to keep, so that weight and adapter must come together.
        """
        merged, keep_base = self.merged, self._base_weight is not None
        needed = ["weight", "lora_A", "lora_B"] + ["lora_magnitude_vector"] * self.use_dora
        missing = [name for name in needed if prefix + name not in state_dict]
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
        """What nn.Module prints between the parentheses."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
        flags = ("use_rslora", "use_dora", "fan_in_fan_out", "merge_weights", "merged")
        return text + "".join(f", {flag}=True" for flag in flags if getattr(self, flag))
