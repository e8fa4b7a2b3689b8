"""`FusedLoraLinear`: a frozen linear with a LoRA bypass, in PEFT's semantics, on the fused operator."""

import math
from collections.abc import Sequence
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from fastlora import validation
from fastlora.blocks.projections import Projection
from fastlora.blocks.sharing import Group, drop, shared
from fastlora.functional import lora_linear
from fastlora.layers.base import FusedLoraLayer
from fastlora.layers.slices import check_slices, from_blocks, to_blocks
from fastlora.rows import accumulator
from fastlora.variants import dora_ops
from fastlora.variants.dora import dora_linear


class Options(TypedDict, total=False):
    """What `FusedLoraLinear` and its `from_linear` take by keyword only; each is False, or None, by default."""

    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    merge_weights: bool
    adapter_dtype: torch.dtype | None
    enable_lora: Sequence[bool] | None


class FusedLoraLinear(FusedLoraLayer):
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, W and bias frozen; dropout in training mode only.

    scaling = lora_alpha / r, or lora_alpha / √r with `use_rslora`.  A is drawn from kaiming_uniform(a=√5) and B is zero, so a
    new module computes what its frozen linear does.  r = 0 is the frozen linear, without lora_A and lora_B.

    Args:
        in_features, out_features, bias: as in nn.Linear.  r: rank.  lora_alpha, lora_dropout: as in PEFT.
        use_rslora: scale by 1/√r (Kalajdzievski, "A rank stabilization scaling factor", 2023).
        use_dora: train the length of each row of W + scaling · B A as well, see `fastlora.variants.dora`.
        fan_in_fan_out: weight is stored (in, out), as in transformers' Conv1D.
        merge_weights: merge on `eval()` and unmerge on `train()`, as loralib does.
        dtype, device: of weight and bias.  adapter_dtype: of lora_A and lora_B; default: dtype.  float32 adapters on a
            float16 or bfloat16 base keep float32 gradients without a float32 copy of x.
        enable_lora: adapt slices of a fused projection, [True, False, True] the q and v of a qkv; each enabled slice has a pair
            of factors of rank r, as in loralib's MergedLinear (`fastlora.layers.slices`).  Not with use_dora.

    Attributes:
        weight (out, in) or, with fan_in_fan_out, (in, out); bias (out,) or None; lora_A (r, in); lora_B (out, r);
        lora_magnitude_vector (out,) with use_dora, else None; scaling; merged.  `state_dict` has the parameters' names as keys
        and describes the same function merged or not.  With n enabled slices of s features each, lora_A is (n · r, in) and
        lora_B (n · s, r).

    Raises:
        TypeError, ValueError: a size, rank, rate or dtype out of range, or a `linear` that cannot be wrapped.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
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
        use_dora: bool = False,
        fan_in_fan_out: bool = False,
        adapter_dtype: torch.dtype | None = None,
        enable_lora: Sequence[bool] | None = None,
        **options: bool,
    ) -> None:
        validation.check_tensor(weight, "weight", 2)
        adapter_dtype = adapter_dtype or weight.dtype
        validation.check_dtype(adapter_dtype, "adapter_dtype")
        out_features, in_features = weight.shape[::-1] if fan_in_fan_out else weight.shape
        slices = [True] if enable_lora is None else enable_lora
        check_slices(slices, out_features)
        n, width = sum(slices), out_features // len(slices)
        validation.check_rank(r, in_features, width)
        validation.check_flag(use_dora, "use_dora")
        if use_dora and not r:
            raise ValueError("use_dora=True needs r >= 1, got r=0: DoRA scales a weight with an adapter")
        if use_dora and enable_lora is not None:
            raise ValueError(f"use_dora=True scales whole weights, and enable_lora={list(enable_lora)} adapts slices of one")
        factor = weight.new_empty((), dtype=adapter_dtype)
        A, B = factor.expand(n * r, in_features), factor.expand(out_features, n * r)
        validation.check_inputs(None, weight.t() if fan_in_fan_out else weight, A, B, bias, None)
        shapes = (n * r, in_features), (n * width, r)
        self._register(weight, bias, shapes, r, lora_alpha, lora_dropout, adapter_dtype=adapter_dtype, **options)
        self.in_features, self.out_features = in_features, out_features
        self.use_dora, self.fan_in_fan_out = use_dora, fan_in_fan_out
        self.enable_lora = None if enable_lora is None else tuple(enable_lora)
        magnitude = nn.Parameter(weight.new_empty(out_features, dtype=adapter_dtype)) if use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self._reset_magnitude()

    @classmethod
    def from_module(cls, module: nn.Module, r: int, lora_alpha: float, lora_dropout: float, **options: Any) -> Self:
        """`from_linear`; every module but an nn.Linear is taken with fan_in_fan_out."""
        return cls.from_linear(module, r, lora_alpha, lora_dropout, fan_in_fan_out=not isinstance(module, nn.Linear), **options)

    def reset_lora_parameters(self) -> None:
        """A from kaiming_uniform(a=√5), that is uniform(±1/√in), B zero, and the magnitude ‖W‖ of each row."""
        if self.lora_A is not None and self.lora_B is not None:
            if self.lora_A.numel():
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        if "lora_magnitude_vector" in self._parameters:  # the constructor makes it afterwards
            self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        """The magnitude that changes nothing: ‖W + scaling · B A‖ of each row."""
        if self.lora_magnitude_vector is not None and self.lora_A is not None and self.lora_B is not None:
            self.lora_magnitude_vector.copy_(dora_ops.DORA_NORM(self._dense_W(), self.lora_A, self.lora_B, self.scaling))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).  A merged module in training warns: its adapter gets no gradient."""
        given: Any = self._projection(x)
        options: Any = {"training": self.training, "backend": self.backend}
        if not isinstance(given, str):
            y = shared(self, x, given)
            weight, A, B, bias, scaling, p = cast(Any, given)
            return lora_linear(x, weight, A, B, bias, scaling=scaling, dropout_p=p, **options) if y is None else y
        drop(self)
        if not self.merged and self.lora_A is not None and self.lora_B is not None and self.lora_magnitude_vector is not None:
            options |= {"scaling": self.scaling, "dropout_p": self.lora_dropout, "magnitude": self.lora_magnitude_vector}
            return dora_linear(x, self._W(), self.lora_A, self.lora_B, self.bias, **options)
        self._adapts()  # warns of a merged layer in training
        return nn.functional.linear(x, self._W(), self.bias)

    def _projection(self, x: Tensor) -> Projection | str:
        """The operands of a call with x, or why it is none of a plain LoRA linear: see `fastlora.blocks.sharing`."""
        if self.merged or self.lora_A is None or self.lora_B is None:
            return "it is merged" if self.merged else "it has rank 0"
        if self.lora_magnitude_vector is not None:
            return "it is DoRA"
        return Projection(self._W(), self.lora_A, self._B(self.lora_B), self.bias, self.scaling, self.lora_dropout)

    def _W(self) -> Any:
        """W (out, in) as `lora_linear` takes it: a tensor, or in a subclass a QuantizedWeight."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _dense_W(self) -> Tensor:
        """W (out, in) as a tensor."""
        return cast(Tensor, self._W())

    def _B(self, B: Tensor) -> Tensor:
        """lora_B as the factor of one adapter, (out, rank)."""
        return B if self.enable_lora is None else to_blocks(B, self.enable_lora)

    def delta_weight(self) -> Tensor:
        """scaling · B A, (out, in), in float32 (float64 for float64 adapters)."""
        if self.lora_A is None or self.lora_B is None:
            return torch.zeros((self.out_features, self.in_features), device=self.weight.device)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self._B(self.lora_B.detach()).to(dtype) @ self.lora_A.detach().to(dtype)) * self.scaling

    def _delta(self) -> Tensor:
        return self.delta_weight().t() if self.fan_in_fan_out else self.delta_weight()

    def merged_weight(self) -> Tensor:
        """`FusedLoraLayer.merged_weight`, each row scaled to its magnitude with use_dora."""
        base, delta = self.weight.detach(), self._delta()
        total = base.to(delta.dtype) + delta
        return dora_ops.scaled(total, self.lora_magnitude_vector, 0 if self.fan_in_fan_out else 1).to(base.dtype)

    def trained(self) -> dict[str, str]:
        """A and B, and with use_dora the magnitude."""
        magnitude = {"lora_magnitude_vector": "lora_magnitude_vector"} if self.use_dora else {}
        return super().trained() | magnitude

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As in the base class; what takes the place of a dropped base weight keeps its length with use_dora."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and self._base_weight is None and self.lora_magnitude_vector is not None:
            W = self._dense_W()
            lengths = torch.linalg.vector_norm(W, dim=1, dtype=accumulator(W.dtype))
            destination[prefix + "lora_magnitude_vector"] = lengths.to(self.lora_magnitude_vector.dtype)

    def to_file(self, name: str, factor: Tensor) -> Tensor:
        """lora_B is saved as that of one adapter, see `fastlora.layers.slices`."""
        return self._B(factor) if name == "lora_B" else factor

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_file`."""
        return from_blocks(tensor, self.enable_lora, self.r) if name == "lora_B" and self.enable_lora else tensor

    def of_config(self) -> dict[str, float]:
        """Those of the one adapter of rank n · r that `to_file` gives, with the same scaling."""
        n = sum(self.enable_lora or [True])
        return {"r": n * self.r, "lora_alpha": self.lora_alpha * (n**0.5 if self.use_rslora and n > 1 else n)}

    def plain_module(self) -> nn.Module:
        """An nn.Linear, or with fan_in_fan_out transformers' Conv1D, on the meta device."""
        with torch.device("meta"):  # what the constructor draws is thrown away
            if self.fan_in_fan_out:
                from transformers.pytorch_utils import Conv1D

                return Conv1D(self.out_features, self.in_features)
            return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)

    def to_linear(self, merged: bool) -> nn.Module:
        """`to_plain`, by the name that a linear has."""
        return self.to_plain(merged)

    def extra_repr(self) -> str:
        """What nn.Module prints between the parentheses."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        slices = "" if self.enable_lora is None else f"enable_lora={list(self.enable_lora)}, "
        return f"{sizes}, {slices}{super().extra_repr()}"
