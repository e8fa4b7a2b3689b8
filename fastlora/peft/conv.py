"""PEFT's Conv1d, Conv2d and Conv3d, accelerated where they are a linear on a view of x: pointwise ones and patches."""

from typing import Any

import torch
from peft.tuners.lora import layer as pefts
from torch import Tensor, nn

from fastlora.layers.conv import convolve_windows, is_linear, windows
from fastlora.peft.fused import Fused
from fastlora.peft.report import COPIED
from fastlora.peft.state import only_adapter, unsupported_call, unsupported_tensors
from fastlora.validation import is_altered
from fastlora.variants.several import Adapter

#: Why a convolution stays PEFT's.
OVERLAPS = "its windows overlap, have gaps or are padded: it is no linear on a view of x, and torch's convolutions are as fast"


class FusedConv(Fused):
    """A mixin before a convolution of PEFT."""

    base_layer: Any

    def _decide(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Adapter | str:
        given, conv = terms(self), self.base_layer
        if isinstance(given, str):
            return given
        if reason := unsupported_call(self, x, args, kwargs):
            return reason
        if x.dim() not in (conv.weight.dim() - 1, conv.weight.dim()) or x.shape[1 - conv.weight.dim()] != conv.in_channels:
            return "x has another shape than the convolution takes"
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and not (all(k == 1 for k in conv.kernel_size) and windows(conv, x).is_contiguous()):
            return COPIED
        return given

    def _fused(self, given: Adapter, x: Tensor, *_: Any) -> Tensor:
        """(N, in, *size) -> (N, out, *size')."""
        constants = {"scaling": given.scaling, "dropout_p": given.dropout_p}
        return convolve_windows(self.base_layer, x, given.lora_A, given.lora_B, **constants)


class FusedConv1d(FusedConv, pefts.Conv1d):
    """`peft.tuners.lora.layer.Conv1d`, fused."""


class FusedConv2d(FusedConv, pefts.Conv2d):
    """`peft.tuners.lora.layer.Conv2d`, fused."""


class FusedConv3d(FusedConv, pefts.Conv3d):
    """`peft.tuners.lora.layer.Conv3d`, fused."""


def unsupported_reason(layer: Any) -> str | None:
    """Why the layer cannot be accelerated, whatever its adapters are; None if it can."""
    base = layer.base_layer
    if type(base) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    if is_altered(base):
        return "its base layer has hooks, or a forward of its own"
    return None if is_linear(base) else OVERLAPS


def terms(layer: Any) -> Adapter | str:
    """The adapter that the layer adds in its present state, or why PEFT computes it."""
    if reason := unsupported_reason(layer):
        return reason
    names = only_adapter(layer, layer.lora_A)
    if isinstance(names, str):
        return names
    A, B, dropout = (modules[names[0]] for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if any(map(is_altered, (A, B, dropout))):
        return "the adapter's modules have hooks, or a forward of their own"
    if B.bias is not None:
        return "the adapter has a bias (lora_bias)"
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    given = Adapter(A.weight, B.weight, layer.scaling[names[0]], p)
    return unsupported_tensors(layer, given) or given
