"""Linears of the real bitsandbytes, and what they stand for: shared by the tests of quantised weights."""

from collections.abc import Iterable

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from saved import saved_by
from torch import nn

from fastlora import lora_linear
from fastlora.quantized import QuantizedWeight, weight_of

KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4 double": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}


def quantize(weight: torch.Tensor, kind: str, bias: torch.Tensor | None = None, **options) -> nn.Module:
    """A layer of bitsandbytes on `weight` (out, in); options: blocksize, quant_storage, compute_dtype of a 4-bit one."""
    out_features, in_features = weight.shape
    if kind == "int8":
        layer = Linear8bitLt(in_features, out_features, bias=bias is not None, has_fp16_weights=False)
        layer.weight = Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(in_features, out_features, bias=bias is not None, compute_dtype=options.pop("compute_dtype", None))
        layer.weight = Params4bit(weight.detach().clone(), requires_grad=False, module=layer, **KINDS[kind], **options)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to("cpu")


def random_layer(kind: str, N: int = 40, K: int = 24, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(N, K, generator=generator).to(dtype), kind, **options)


def adapter(N: int, K: int, r: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(r, K, generator=generator) / K**0.5, torch.randn(N, r, generator=generator)
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def by_definition(layer: nn.Module) -> torch.Tensor:
    """The dense weight in float64, by the formulas of the module's docstring, one element after another."""
    if isinstance(layer, Linear8bitLt):
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.double() * scale.double()[:, None] / 127
    state = layer.weight.quant_state
    codes = layer.weight.data.contiguous().view(torch.uint8).flatten().long()
    codes = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[: state.shape.numel()]
    absmax = state.absmax.double()
    if state.nested:
        index = torch.arange(len(absmax)) // state.state2.blocksize
        absmax = state.state2.code.double()[state.absmax.long()] * state.state2.absmax.double()[index] + state.offset
    blocks = torch.arange(len(codes)) // state.blocksize
    return (state.code.double()[codes] * absmax[blocks]).view(state.shape)


def dense(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What `weight` is once quantised, in float32; the same for its float64 copy."""
    return weight_of(quantize(weight.float(), kind)).dequantize(torch.float32)


def saved_by_reference(weight: QuantizedWeight, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """S, the one tensor that `lora_linear` saves beside x, A, B and the packed weight with its statistics, which it shares."""
    saved = saved_by(lambda: lora_linear(x, weight, A, B))
    known = (x, A, B, weight.packed, *weight.statistics)
    storages = [tensor.untyped_storage().data_ptr() for tensor in known]
    (S,) = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in storages]
    assert size(saved) == size((*known, S))
    return S


def size(tensors: Iterable[torch.Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
