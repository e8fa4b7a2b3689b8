"""HQQ's HQQLinear, of 1, 2, 3, 4 and 8 bits.

W is viewed as a matrix of groups, one a row (axis 1) or a column (axis 0), whose codes are W_q:

    W = ((W_q − zero) · scale).reshape(out, in)

rounded after each step to the compute dtype, which scale and zero have, as HQQ's own `dequantize` does.
A word of W_q holds codes of rows that lie far apart: the first rows in its highest bits.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.quantized.codes import unpack
from fastlora.quantized.weight import Family, QuantizedWeight, Scheme, is_layer

#: Where the codes lie in a word, by bits; those of 3 bits are in an int32, the others in a byte.
SHIFTS = {8: (0,), 4: (4, 0), 3: tuple(range(27, -1, -3)), 2: (6, 4, 2, 0), 1: tuple(range(7, -1, -1))}


def read(linear: Any) -> QuantizedWeight | str | None:
    """See `Family`."""
    if not is_layer(linear, "hqq.core.quantize:HQQLinear"):
        return None
    meta = linear.meta
    if not linear.ready or not meta.get("packing"):
        return "is not quantised and packed yet"
    if "scale" not in meta or "zero" not in meta:
        return "quantises or offloads its scales as well"
    packed = linear.W_q.data
    if meta["view_as_float"]:
        packed = packed.view(meta["unpack_view_dtype"])
    bits = int(meta["packing"][0])  # "4bit_u8"; 5 and 6 bits are stored as 8
    scheme = Scheme("hqq", (meta["shape"][0], meta["shape"][1]), (bits,))
    scale, zero = meta["scale"].data, meta["zero"].data
    if linear.compute_dtype == torch.float32:  # HQQ leaves an inference tensor there, which autograd cannot save
        zero = zero.clone()
    return QuantizedWeight(packed, (scale, zero), scheme, linear.compute_dtype)


def _dense(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    packed, (scale, zero), (bits,) = weight.packed, weight.statistics, weight.scheme.options
    rows = weight.shape[0] * weight.shape[1] // packed.shape[1]  # 3 bits: the last word may hold codes too many
    codes = torch.cat(unpack(packed, bits, SHIFTS[bits]))[:rows]
    return codes.to(scale.dtype).sub_(zero).mul_(scale).reshape(weight.shape).to(dtype)


FAMILY = Family(read, {"hqq": _dense})
