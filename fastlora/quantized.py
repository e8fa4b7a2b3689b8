"""Frozen weights kept in 4 or 8 bits by bitsandbytes, and the dense weight they stand for.

4 bits: blocks of `blocksize` neighbouring elements of W, read row by row, share a scale,

    W[i] = codebook[code[i]] · absmax[i // blocksize]

with two codes to a byte and the 16-entry codebook "nf4" or "fp4".  With double quantisation absmax is stored in 8 bits itself:
absmax[j] = codebook8[code8[j]] · absmax2[j // blocksize2] + offset.  8 bits: W[n, k] = CB[n, k] · SCB[n] / 127, a scale a row.

`lora_linear` makes the dense weight in x's dtype where a product needs it, once in forward and once in backward, and drops it
after the product: what autograd keeps is the packed weight.  Both steps multiply with W as stated above, rounded once to x's
dtype.  bitsandbytes' 4-bit layers compute so too.  Its 8-bit layers do in backward, and in training on a CPU; otherwise their
forward rounds x to 8 bits as well (LLM.int8()), so that y is nearer to x Wᵀ here than there.

Making it is one operator of `torch.library`, so that torch.compile traces calls with a packed weight; in backward it takes the
incoming gradient too, without reading it, or a compiler would share the dense weight of forward and so keep it.

bitsandbytes is never imported from here: a layer of its can only exist where it has been.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

#: What the dense weight can be made in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: What `quantize` can make of a weight.
KINDS = ("nf4", "fp4")

#: bitsandbytes multiplies up to this many rows (on CUDA, 0.50) straight from the packed weight where no gradient is recorded.
FEW_ROWS = 1536


_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define(
    "dequantize(Tensor packed, Tensor[] statistics, str kind, SymInt[] shape, int blocksize, int blocksize2, "
    "ScalarType dtype, Tensor? after) -> Tensor"
)


class Scheme(NamedTuple):
    """How packed bits are to be read: the part of a quantised weight that is no tensor."""

    kind: str  # "nf4", "fp4" or "int8"
    shape: tuple[int, int]  # (out, in)
    blocksize: int = 0
    blocksize2: int = 0  # that of double quantisation, 0 without


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight W (out, in), stored packed.

    Attributes:
        packed: the codes: of 4 bits any shape and storage dtype; of 8 bits CB, int8 (out, in).
        statistics: (absmax,) in float32; with double quantisation (code8, absmax2, codebook8, offset); of 8 bits (SCB,).
        scheme: kind, shape and block sizes.
    """

    packed: Tensor
    statistics: tuple[Tensor, ...]
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.scheme.shape

    @property
    def device(self) -> torch.device:
        """Where the packed weight lives."""
        return self.packed.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), rounded once to `dtype`: float32, float16 or bfloat16."""
        return dequantize(self.scheme, self.packed, self.statistics, dtype)


def dequantize(
    scheme: Scheme, packed: Tensor, statistics: Sequence[Tensor], dtype: torch.dtype, after: Tensor | None = None
) -> Tensor:
    """W (out, in) in `dtype`, from the parts of a `QuantizedWeight`; under torch.compile not before `after` exists."""
    return torch.ops.fastlora.dequantize(packed, statistics, *scheme, dtype, after)


def _dequantize(
    packed: Tensor,
    statistics: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    blocksize: int,
    blocksize2: int,
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    if kind == "int8":
        (row_scale,) = statistics
        return packed.to(dtype).mul_(row_scale.unsqueeze(1) * (1 / 127))  # the product is taken in float32, then rounded
    absmax, *nested = statistics
    if nested:
        absmax2, codebook8, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, absmax2, codebook8, blocksize2, torch.float32) + offset
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, kind, shape, dtype)


@torch.library.register_fake("fastlora::dequantize", lib=_LIBRARY)
def _dequantize_fake(packed, statistics, kind, shape, blocksize, blocksize2, dtype, after):  # type: ignore[no-untyped-def]  # the schema types it
    return packed.new_empty(shape, dtype=dtype)


_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


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
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return False
    kinds = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt
    return any(isinstance(linear, kind) and type(linear).forward is kind.forward for kind in kinds)


def unsupported_reason(linear: Any) -> str | None:
    """Why the weight of a quantised layer cannot be read, as the end of a sentence about the layer; None where it can."""
    unquantised = "is not quantised yet: move it to a device first"
    if _is_8bit(linear):
        if linear.state.has_fp16_weights:
            return "keeps its weight in 16 bits (has_fp16_weights=True)"
        CB, SCB = _int8_codes(linear)
        return unquantised if CB is None or SCB is None else None
    state = _state4(linear)
    if getattr(state, "packing_format_for_cpu", False):
        return "has laid its weight out for inference on this CPU"
    return unquantised if state is None else None


def weight_of(linear: nn.Module) -> QuantizedWeight:
    """The packed weight of a bitsandbytes Linear4bit or Linear8bitLt; its tensors are shared, not copied.

    Raises:
        TypeError: `linear` is no such layer.
        ValueError: its weight is not quantised yet, or laid out for bitsandbytes' own products only.
    """
    if not is_quantized(linear):
        raise TypeError(f"linear must be a bitsandbytes Linear4bit or Linear8bitLt, got {type(linear).__name__}")
    if reason := unsupported_reason(linear):
        raise ValueError(f"linear is a {type(linear).__name__} that {reason}")
    if _is_8bit(linear):
        codes, row_scale = _int8_codes(linear)
        return QuantizedWeight(codes, (row_scale,), Scheme("int8", (codes.shape[0], codes.shape[1])))
    return of_4bit(cast(Tensor, linear.weight), _state4(linear))


def of_4bit(packed: Tensor, state: Any) -> QuantizedWeight:
    """A packed 4-bit weight with bitsandbytes' QuantState of it."""
    absmax = state.absmax if state.nested else state.absmax.float()
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    blocksize2 = state.state2.blocksize if state.nested else 0
    scheme = Scheme(state.quant_type, (state.shape[0], state.shape[1]), state.blocksize, blocksize2)
    return QuantizedWeight(packed.data, (absmax, *nested), scheme)


def unsupported_input(linear: nn.Module, x: Tensor) -> str | None:
    """None where `lora_linear(x, weight_of(linear), ...)`, cast to x's dtype, is what `linear` and PEFT's adapter on it compute
    together; otherwise why it is not, as the end of a sentence that begins with the layer's name.

    A Linear4bit computes in its compute dtype and answers in x's, outside autocast's reach, while the adapter's branch runs in
    its own dtype, or in autocast's.  The two meet in one dtype where x has the compute dtype, and also under autocast where the
    compute dtype is autocast's and x is float32: base and adapter then both see x rounded to it.
    """
    if reason := unsupported_reason(linear):
        return reason
    kind = x.device.type
    # On a CPU bitsandbytes would lay the weight out anew for that, and training could not go on from there.
    if kind != "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]:
        return "multiplies few rows straight from its packed weight where no gradient is recorded"
    autocast = torch.get_autocast_dtype(kind) if _autocasts(kind) else None
    compute = getattr(linear, "compute_dtype", None) or x.dtype
    if compute not in DTYPES:
        return f"computes in {compute}"
    if compute == x.dtype and autocast in (None, compute):
        return None
    if compute == autocast and x.dtype == torch.float32:
        return None
    under = f" under autocast to {autocast}" if autocast else ""
    return f"computes in {compute} on an input in {x.dtype}{under}: base and adapter would need different dtypes"


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _is_8bit(linear: nn.Module) -> bool:
    return hasattr(linear, "state")


def _state4(linear: Any) -> Any:
    """The QuantState of a Linear4bit: its weight's, or the module's where a wrapper such as FSDP has replaced the weight."""
    state = getattr(linear.weight, "quant_state", None)
    return getattr(linear, "quant_state", None) if state is None else state


def _int8_codes(linear: Any) -> tuple[Any, Any]:
    """(CB, SCB) of a Linear8bitLt: its weight's until the first forward, from then on its state's."""
    holder = linear.weight if getattr(linear.weight, "CB", None) is not None else linear.state
    return holder.CB, holder.SCB
