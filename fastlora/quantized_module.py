"""`FusedLoraLinear4bit`: a LoRA linear on a frozen weight of 4 bits, QLoRA without PEFT."""

from typing import Any, Self, Unpack, cast

import torch
from torch import Tensor, nn

from fastlora import quantized, validation
from fastlora.modules import FusedLoraLinear, Options
from fastlora.quantized import QuantizedWeight
from fastlora.variants import dora_ops


class FusedLoraLinear4bit(FusedLoraLinear):
    """`FusedLoraLinear` whose weight is a bitsandbytes Params4bit: y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ in x's dtype.

    W is made dense for one product at a time and never kept, see `fastlora.quantized`.  Made by `from_linear`, with r >= 1.
    `state_dict` holds the packed weight and its quantisation state under the keys of bitsandbytes' Linear4bit.  Merging would
    round the adapter away: `merge` refuses, `merged_weight` gives the dense sum, `fastlora.merge_and_unload` linears of it.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, **options: Unpack[Options]
    ) -> Self:
        """Wrap a bitsandbytes Linear4bit: the same weight, and a bias that shares the storage of its.

        Arguments as of `FusedLoraLinear.from_linear`; adapter_dtype is by default the dtype of the weight before quantisation.

        Raises:
            TypeError, ValueError: `linear` is another module, not quantised yet or has hooks, merge_weights or fan_in_fan_out
                is set, or an argument is out of range.
        """
        weight = quantized.weight_of(linear)
        if weight.scheme.kind not in quantized.KINDS:
            raise TypeError(f"linear must be a bitsandbytes Linear4bit, got {type(linear).__name__}")
        validation.check_linear(linear, fan_in_fan_out=False)
        for option, value in {**options, "r": r}.items():
            if (option, value) in (("merge_weights", True), ("fan_in_fan_out", True), ("r", 0)):
                raise ValueError(f"{option}={value} is not possible on a weight of 4 bits")
        frozen: Any = linear
        dense = torch.empty((), dtype=frozen.weight.quant_state.dtype, device=weight.device).expand(weight.shape)
        module = cls.__new__(cls)
        module._setup(dense, None, r, lora_alpha, lora_dropout, **options)  # it needs the weight's shape, dtype and device only
        module.weight = frozen.weight
        module.bias = None if frozen.bias is None else cls._frozen(frozen.bias.detach())
        module._reset_magnitude()
        return module.train(linear.training)

    @property
    def _state(self) -> Any:
        """bitsandbytes' QuantState of the weight."""
        return cast(Any, self.weight).quant_state

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """W, packed."""
        return quantized.of_4bit(self.weight, self._state)

    def _W(self) -> QuantizedWeight:
        return self.quantized_weight

    def _dense_W(self) -> Tensor:
        if getattr(self.weight, "quant_state", None) is None:  # the stand-in of `from_linear`
            return self.weight
        return self.quantized_weight.dequantize(self._state.dtype)

    def merged_weight(self) -> Tensor:
        """W + scaling · B A, dense, summed in float32 and rounded once to the dtype that W had before quantisation."""
        weight = self.quantized_weight.dequantize(torch.float32)
        return dora_ops.scaled(weight.add_(self.delta_weight()), self.lora_magnitude_vector, 1).to(self._state.dtype)

    def merge(self, keep_base: bool = True) -> None:
        """Refused.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "merge() on a weight of 4 bits would round the adapter away: merged_weight() is the dense sum, and "
            "fastlora.merge_and_unload(model) puts dense linears in place"
        )

    def to_plain(self, merged: bool) -> nn.Module:
        """With `merged` an nn.Linear on `merged_weight`, otherwise the Linear4bit that is below; bias is shared."""
        plain = super().to_plain(True) if merged else quantized.linear_of(self.weight, self.bias, self._state)
        return plain.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self._state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The packed weight and its quantisation state come together, as they are saved."""
        start = f"{prefix}weight."
        state = {key: tensor for key, tensor in state_dict.items() if key.startswith(start)}
        _, _, missing, unexpected, errors = args
        packed = state_dict.get(f"{prefix}weight")
        if bool(state) != (packed is not None):
            missing.append(f"{prefix}weight" if packed is None else f"{start}quant_state")
        elif packed is not None:
            loaded = cast(Any, self.weight).from_prequantized(packed, dict(state), device=self.weight.device)
            shape = tuple(loaded.quant_state.shape)
            if shape != (self.out_features, self.in_features):
                errors.append(f"{prefix}weight is {shape}, expected {self.out_features, self.in_features}")
                return
            self.weight = loaded
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected[:] = [key for key in unexpected if key not in state]

    def extra_repr(self) -> str:
        """What nn.Module prints between the parentheses."""
        return f"{super().extra_repr()}, {self.quantized_weight.scheme.kind}"
