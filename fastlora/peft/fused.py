"""The accelerated layer: PEFT's LoRA linear with another forward."""

from typing import Any

import torch
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from fastlora.blocks.projections import Projection
from fastlora.blocks.sharing import Group, drop, shared
from fastlora.functional import lora_linear
from fastlora.peft.calls import INTENDED, decide
from fastlora.peft.report import Tally
from fastlora.quantized import QuantizedWeight
from fastlora.variants.dora import dora_linear
from fastlora.variants.several import Adapter, lora_adapters


class Fused(nn.Module):
    """A mixin before a LoRA linear of PEFT. Its forward is `lora_linear` wherever that computes the same.

    A mixin for another type of layer overrides `_decide` and `_fused`.

    There is no constructor: `fastlora.peft.layers.fuse` changes the class of a layer that PEFT made.
    """

    _fastlora_tally: Tally
    _fastlora_group: Group | None = None
    backend: None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's layer computes of x, fused or by PEFT."""
        given = self._decide(x, args, kwargs)
        if isinstance(given, str):
            note(self, given)
            drop(self)
            return super().forward(x, *args, **kwargs)
        return self._fused(given, x, *args)

    def _decide(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `_fused` computes with, or why layer(x, *args, **kwargs) runs PEFT's forward."""
        return decide(self, x, args, kwargs)

    def _fused(self, given: Any, x: Tensor, *args: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        weight, A, B, bias, scaling, p, magnitude, others, owner = given
        if given.is_plain:
            y = shared(self, x, Projection(*given[:6]))
            if y is None:
                y = lora_linear(x, weight, A, B, bias, scaling=scaling, dropout_p=p)
        else:
            drop(self)
            if magnitude is not None:
                y = dora_linear(x, weight, A, B, bias, magnitude=magnitude, scaling=scaling, dropout_p=p)
            else:
                y = lora_adapters(x, weight, [Adapter(A, B, scaling, p), *others], bias, owner=owner)
        return y.to(x.dtype) if isinstance(weight, QuantizedWeight) else y

    def _projection(self, x: Tensor) -> Projection | str:
        """What a call with x passes to `lora_linear`, or why something else computes it: see `fastlora.blocks.sharing`."""
        given = decide(self, x, (), {})
        if isinstance(given, str):
            return given
        return Projection(*given[:6]) if given.is_plain else "its adapter is DoRA, or one of several"


class FusedLinear(Fused, Linear):
    """`peft.tuners.lora.layer.Linear`, fused."""


class FusedTorchaoLinear(Fused, TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear`, fused."""


class FusedGPTQLinear(Fused, GPTQLoraLinear):
    """`peft.tuners.lora.gptq.GPTQLoraLinear`, fused."""


class FusedAwqLinear(Fused, AwqLoraLinear):
    """`peft.tuners.lora.awq.AwqLoraLinear`, fused."""


#: The accelerated class of each class of PEFT that needs no optional library; `fastlora.peft.bnb` and `.hqq` have the others.
FUSED: dict[type[nn.Module], type[Fused]] = {
    Linear: FusedLinear,
    TorchaoLoraLinear: FusedTorchaoLinear,
    GPTQLoraLinear: FusedGPTQLinear,
    AwqLoraLinear: FusedAwqLinear,
}


@torch.compiler.assume_constant_result  # torch.compile runs it while tracing: no graph break, and no guard on the counters
def note(layer: Fused, reason: str) -> None:
    """Count a call that PEFT computes, and warn in training unless it was asked for."""
    layer._fastlora_tally.note(reason, warn=layer.training and torch.is_grad_enabled() and reason not in INTENDED)
