"""Frozen weights kept in 8 bits or fewer by other libraries, and the dense weight they stand for.

`lora_linear` makes the dense weight in x's dtype where a product needs it, once in forward and once in backward, and drops it
after the product: what autograd keeps is the packed weight.  Both steps multiply with W as the module of its library states it,
rounded once to x's dtype if not said otherwise.

Making it is one operator of `torch.library`, so that torch.compile traces calls with a packed weight; in backward it takes the
incoming gradient too, without reading it, or a compiler would share the dense weight of forward and so keep it.

FAMILIES is the table of what is supported: a format more is an entry more.  No library is imported from here: a layer of it can
only exist where it has been.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.quantized import bitsandbytes, fp8, gptq, hqq, torchao
from fastlora.quantized.bitsandbytes import KINDS, is_quantized, linear_of, of_4bit, quantize
from fastlora.quantized.weight import DTYPES, Family, QuantizedWeight, Scheme, dequantize
from fastlora.validation import autocast_dtype

__all__ = ["KINDS", "dequantize", "is_quantized", "linear_of", "of_4bit", "quantize", "read", "unsupported_input", "weight_of"]

FAMILIES = (bitsandbytes.FAMILY, torchao.FAMILY, hqq.FAMILY, gptq.FAMILY, fp8.FAMILY)

_DENSE = {kind: dense for family in FAMILIES for kind, dense in family.dense.items()}
_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define(
    "dequantize(Tensor packed, Tensor[] statistics, str kind, SymInt[] shape, SymInt[] options, ScalarType dtype, "
    "Tensor? after) -> Tensor"
)


def _dequantize(
    packed: Tensor,
    statistics: Sequence[Tensor],
    kind: str,
    shape: Sequence[int],
    options: Sequence[int],
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    weight = QuantizedWeight(packed, tuple(statistics), Scheme(kind, (shape[0], shape[1]), tuple(options)))
    return _DENSE[kind](weight, dtype)


@torch.library.register_fake("fastlora::dequantize", lib=_LIBRARY)
def _dequantize_fake(packed, statistics, kind, shape, options, dtype, after):  # type: ignore[no-untyped-def]  # the schema types it
    return packed.new_empty(shape, dtype=dtype)


_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


def read(linear: nn.Module) -> QuantizedWeight | str | None:
    """The packed weight of a quantised layer, its tensors shared; or why it cannot be read, as the end of a sentence about the
    layer; or None where `linear` is no layer of FAMILIES."""
    return _find(linear)[1]


def weight_of(linear: nn.Module) -> QuantizedWeight:
    """The packed weight of a quantised layer; its tensors are shared, not copied.

    Raises:
        TypeError: `linear` is no layer of FAMILIES.
        ValueError: its weight is not quantised yet, or laid out for its library's own products only.
    """
    weight = read(linear)
    if weight is None:
        raise TypeError(
            "linear must be a quantised layer of bitsandbytes (Linear4bit or Linear8bitLt), torchao, HQQ, GPTQModel or "
            f"transformers (FP8Linear), got {type(linear).__name__}"
        )
    if isinstance(weight, str):
        raise ValueError(f"linear is a {type(linear).__name__} that {weight}")
    return weight


def unsupported_input(linear: nn.Module, x: Tensor) -> str | None:
    """None where `lora_linear(x, weight_of(linear), ...)`, cast to x's dtype, is what `linear` and PEFT's adapter on it compute
    together; otherwise why it is not, as the end of a sentence that begins with the layer's name.

    The adapter's branch runs in its own dtype, or in autocast's.  It meets the base in one dtype where x has the dtype that the
    base computes in and autocast, if on, has it too.  A base that casts x and its result itself (bitsandbytes') also meets it
    under autocast to its compute dtype where x is float32: base and adapter then both see x rounded to it.
    """
    family, weight = _find(linear)
    if family is None or weight is None:
        return "is not quantised"
    if isinstance(weight, str):
        return weight
    kind = x.device.type
    # On a CPU bitsandbytes would lay the weight out anew for that, and training could not go on from there.
    if kind != "cpu" and not torch.is_grad_enabled() and x.numel() <= family.few_rows * x.shape[-1]:
        return "multiplies few rows straight from its packed weight where no gradient is recorded"
    autocast = autocast_dtype(x.device)
    compute = weight.compute_dtype or x.dtype
    if compute not in DTYPES:
        return f"computes in {compute}"
    if compute == x.dtype and autocast in (None, compute):
        return None
    if family.casts and compute == autocast and x.dtype == torch.float32:
        return None
    under = f" under autocast to {autocast}" if autocast else ""
    return f"computes in {compute} on an input in {x.dtype}{under}: base and adapter would need different dtypes"


def _find(linear: Any) -> tuple[Family | None, QuantizedWeight | str | None]:
    for family in FAMILIES:
        if (weight := family.read(linear)) is not None:
            return family, weight
    return None, None
