"""torchao's tensors of 8 bits in an nn.Linear's weight: int8, float8, and fewer bits unpacked to int8; weight-only.

W[n, k] = (qdata[n, k] − zero_point[n // b, k // c]) · scale[n // b, k // c]      b, c = block_size
"""

import sys
from typing import Any

from torch import nn

from fastlora.quantized.codes import blocks
from fastlora.quantized.weight import Family, QuantizedWeight, Scheme

READABLE = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
#: What a weight has that treats x as well.
ACTIVATION = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def read(linear: Any) -> QuantizedWeight | str | None:
    """See `Family`."""
    utils = sys.modules.get("torchao.utils")
    weight = getattr(linear, "weight", None)
    if utils is None or type(linear) is not nn.Linear or not isinstance(weight, utils.TorchAOBaseTensor):
        return None
    w: Any = weight
    if type(w).__name__ not in READABLE:
        return f"has a weight of torchao's {type(w).__name__}, which is none of {', '.join(READABLE)}"
    if any(getattr(w, name, None) is not None for name in ACTIVATION):
        return "rounds or scales its input too (torchao's activation quantisation)"
    zero = getattr(w, "zero_point", None)
    statistics = (w.scale,) if zero is None else (w.scale, zero)
    scheme = Scheme("torchao", (w.shape[0], w.shape[1]), tuple(w.block_size))
    return QuantizedWeight(w.qdata, statistics, scheme, w.dtype)


FAMILY = Family(read, {"torchao": blocks})
