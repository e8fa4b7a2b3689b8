"""transformers' FP8Linear: float8 codes, with a scale for each block (DeepSeek's 128 × 128) or one for all.

    W[n, k] = weight[n, k] · weight_scale_inv[n // b, k // c]      b, c = block_size

The layer's forward rounds x to float8 as well, its backward does not.  So y is nearer to x Wᵀ here than there.
"""

from typing import Any

from fastlora.quantized.codes import blocks
from fastlora.quantized.weight import Family, QuantizedWeight, Scheme, is_layer


def read(linear: Any) -> QuantizedWeight | str | None:
    """See `Family`."""
    if not is_layer(linear, "transformers.integrations.finegrained_fp8:FP8Linear"):
        return None
    weight, scale = linear.weight.data, linear.weight_scale_inv.data.float()  # some have it in float8_e8m0fnu
    if not weight.is_floating_point() or weight.itemsize != 1:
        return f"keeps its weight in {weight.dtype} instead of float8"
    if linear.activation_scale is not None:
        return "rounds its input with a fixed scale"
    shape = weight.shape[0], weight.shape[1]
    block = linear.block_size or shape
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    return QuantizedWeight(weight, (scale,), Scheme("fp8", shape, tuple(block)))


FAMILY = Family(read, {"fp8": blocks})
