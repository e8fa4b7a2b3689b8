"""bitsandbytes' Linear4bit and Linear8bitLt.

4 bits: blocks of `blocksize` neighbouring elements of W, read row by row, share a scale,

    W[i] = codebook[code[i]] · absmax[i // blocksize]

with two codes to a byte and the 16-entry codebook "nf4" or "fp4".  With double quantisation absmax is stored in 8 bits itself:
absmax[j] = codebook8[code8[j]] · absmax2[j // blocksize2] + offset.  8 bits: W[n, k] = CB[n, k] · SCB[n] / 127, a scale a row.

A 4-bit layer multiplies with W rounded to its compute dtype, as fastlora does.  An 8-bit one does so in backward, and in
training on a CPU; otherwise its forward rounds x to 8 bits as well (LLM.int8()), so that y is nearer to x Wᵀ here than there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.quantized.weight import DTYPES, Family, QuantizedWeight, Scheme, is_layer

#: What `quantize` can make of a weight.
KINDS = ("nf4", "fp4")


def quantize(linear: nn.Module, kind: str) -> nn.Module:
    """A bitsandbytes Linear4bit with `linear`'s weight rounded to `kind`, "nf4" or "fp4", with double quantisation.

    It shares `linear`'s bias, device and training mode, and computes in x's dtype.

    Raises:
        ValueError: another kind, or a weight on the meta device.  TypeError: `linear` is no plain nn.Linear, or float64.
        ImportError: bitsandbytes is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of {KINDS}, got {kind!r}")
    if type(linear) is not nn.Linear or linear.weight.dtype not in DTYPES:
        what = f"weight in {linear.weight.dtype}" if type(linear) is nn.Linear else type(linear).__name__
        raise TypeError(f"quantize={kind!r} takes an nn.Linear in float32, float16 or bfloat16, got a {what}")
    weight = linear.weight.detach()
    if weight.is_meta:
        raise ValueError(f"quantize={kind!r} needs the weight, which is on the meta device: load the model first")
    try:
        from bitsandbytes.nn import Params4bit
    except ImportError as error:
        raise ImportError(f"quantize={kind!r} needs bitsandbytes: pip install bitsandbytes") from error
    packed: Any = Params4bit(weight, requires_grad=False, quant_type=kind)
    packed = packed.to(weight.device)
    return linear_of(packed, linear.bias, packed.quant_state).train(linear.training)


def linear_of(packed: nn.Parameter, bias: nn.Parameter | None, state: Any) -> nn.Module:
    """The Linear4bit on these parameters; state is the QuantState of `packed`."""
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = state.shape
    with torch.device("meta"):  # what the constructor draws is thrown away
        layer: Any = Linear4bit(
            in_features, out_features, bias=bias is not None, compress_statistics=state.nested, quant_type=state.quant_type
        )
    layer.weight, layer.bias, layer.quant_state, layer.quant_storage = packed, bias, state, packed.dtype
    return layer


def is_quantized(linear: nn.Module) -> bool:
    """Whether `linear` is a Linear4bit or Linear8bitLt with bitsandbytes' own forward, its weight quantised already or not."""
    return is_layer(linear, "bitsandbytes.nn:Linear4bit", "bitsandbytes.nn:Linear8bitLt")


def read(linear: Any) -> QuantizedWeight | str | None:
    """See `Family`.  The packed weight has as statistics (absmax,) in float32; with double quantisation (code8, absmax2,
    codebook8, offset); of 8 bits (SCB,)."""
    if not is_quantized(linear):
        return None
    unquantised = "is not quantised yet: move it to a device first"
    if hasattr(linear, "state"):
        if linear.state.has_fp16_weights:
            return "keeps its weight in 16 bits (has_fp16_weights=True)"
        # The first forward moves CB and SCB from the weight to the layer's state.
        holder = linear.weight if getattr(linear.weight, "CB", None) is not None else linear.state
        codes, row_scale = holder.CB, holder.SCB
        if codes is None or row_scale is None:
            return unquantised
        return QuantizedWeight(codes, (row_scale,), Scheme("int8", (codes.shape[0], codes.shape[1])))
    # A wrapper such as FSDP replaces the weight; the layer keeps the state too.
    state = getattr(linear.weight, "quant_state", None)
    state = getattr(linear, "quant_state", None) if state is None else state
    if state is None:
        return unquantised
    if getattr(state, "packing_format_for_cpu", False):
        return "has laid its weight out for inference on this CPU"
    return of_4bit(linear.weight, state, linear.compute_dtype)


def of_4bit(packed: Tensor, state: Any, compute_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """A packed 4-bit weight with bitsandbytes' QuantState of it."""
    absmax = state.absmax if state.nested else state.absmax.float()
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    blocksize2 = state.state2.blocksize if state.nested else 0
    scheme = Scheme(state.quant_type, (state.shape[0], state.shape[1]), (state.blocksize, blocksize2))
    return QuantizedWeight(packed.data, (absmax, *nested), scheme, compute_dtype)


def _dense4(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    (absmax, *nested), (blocksize, blocksize2) = weight.statistics, weight.scheme.options
    if nested:
        absmax2, codebook8, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, absmax2, codebook8, blocksize2, torch.float32) + offset
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, blocksize, weight.scheme.kind, weight.shape, dtype)


def _dense8(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    (row_scale,) = weight.statistics
    return weight.packed.to(dtype).mul_(row_scale.unsqueeze(1) * (1 / 127))  # the product is taken in float32, then rounded


#: bitsandbytes multiplies up to 1536 rows (on CUDA, 0.50) straight from the packed weight where no gradient is recorded.
FAMILY = Family(read, {"nf4": _dense4, "fp4": _dense4, "int8": _dense8}, casts=True, few_rows=1536)
