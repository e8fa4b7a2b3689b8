"""The accelerated layer, and how PEFT's layer becomes one and PEFT's again."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fastlora.functional import lora_linear
from fastlora.peft.base import weight_of
from fastlora.peft.calls import INTENDED, decide, operands
from fastlora.peft.report import Report, Tally
from fastlora.quantized import QuantizedWeight


class Fused(nn.Module):
    """Put before a LoRA linear of PEFT's: its forward is `lora_linear` wherever that computes the same.

    Instances are made by giving an instance of PEFT's class the class made of both.
    """

    _fastlora_tally: Tally

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out): fused or PEFT's, see `fastlora.peft.calls`."""
        given = decide(self, x, args, kwargs)
        if isinstance(given, str):
            _note(self, given)
            return super().forward(x, *args, **kwargs)
        y = lora_linear(
            x, given.weight, given.lora_A, given.lora_B, given.bias, scaling=given.scaling, dropout_p=given.dropout_p
        )
        return y.to(x.dtype) if isinstance(given.weight, QuantizedWeight) else y


class FusedLinear(Fused, Linear):
    """`peft.tuners.lora.layer.Linear`, fused."""


def _fused_class(layer: nn.Module) -> type[Fused] | None:
    """The fused class for an instance of one of PEFT's, if there is one."""
    if type(layer) is Linear:
        return FusedLinear
    if "peft.tuners.lora.bnb" in sys.modules:  # it imports bitsandbytes
        from fastlora.peft import bnb

        return bnb.FUSED.get(type(layer))
    return None


@torch.compiler.assume_constant_result  # so that torch.compile runs it while tracing, and neither breaks nor guards on counters
def _note(layer: Fused, reason: str) -> None:
    layer._fastlora_tally.note(reason, warn=layer.training and torch.is_grad_enabled() and reason not in INTENDED)


def find(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers in `model`, by name.

    Raises:
        TypeError: model is no nn.Module.  ValueError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module with PEFT's LoRA layers, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not found:
        raise ValueError(f"model, a {type(model).__name__}, holds no LoRA layer of PEFT's: call peft.get_peft_model(...) first")
    return found


def is_fused(layer: Any) -> bool:
    """Whether the layer is accelerated."""
    return isinstance(layer, Fused)


def unsupported_reason(layer: Any) -> str | None:
    """Why the layer cannot be accelerated, whatever its adapters are; None where it can."""
    if is_fused(layer):
        return "already accelerated"
    if _fused_class(layer) is None:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}, not peft's lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    weight = weight_of(layer.base_layer)
    if isinstance(weight, str):
        return weight
    return "its base weight is on the meta device: load it first" if weight.device.type == "meta" else None


def describe(layers: Mapping[str, Any], reasons: Mapping[str, str | None]) -> Report:
    """The report on layers of which those without an unsupported_reason are, or are to be, accelerated."""
    taken, waiting, left = [], [], []
    for name, layer in layers.items():
        if reason := reasons[name]:
            left.append((name, reason))
        elif isinstance(given := operands(layer), str):
            waiting.append((name, given))
        else:
            taken.append(name)
    return Report(tuple(taken), tuple(waiting), tuple(left))


def shared_warnings(layers: Iterable[Any]) -> set[str]:
    """The reasons already warned about in this model."""
    return next((tally_of(layer).warned for layer in layers if is_fused(layer)), set())


def tally_of(layer: Any) -> Tally:
    """The count of an accelerated layer's fallbacks."""
    return layer._fastlora_tally


def fuse(layer: Any, warned: set[str]) -> None:
    """Make a layer without an unsupported_reason an accelerated one."""
    layer._fastlora_tally = Tally(warned)
    layer.__class__ = _fused_class(layer)


def restore(layer: Any) -> None:
    """Give an accelerated layer its class back."""
    layer.__class__ = type(layer).__bases__[1]
    del layer._fastlora_tally
