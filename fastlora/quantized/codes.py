"""What formats share: a scale for each block of codes, and several codes in one word."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.quantized.weight import QuantizedWeight


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W[n, k] = (codes[n, k] − zero[n // b, k // c]) · scale[n // b, k // c] in `dtype`, contiguous, where b, c = block.

    Codes are integers or float8, (out, in).  scale and zero are (⌈out / b⌉, ⌈in / c⌉); a zero of None is 0.
    Their products are taken in the wider dtype of scale's and W's, and rounded once.
    """
    W = torch.empty(codes.shape, dtype=dtype, device=codes.device).copy_(codes)
    rows, columns = block
    whole = W.shape[1] // columns
    parts = W[:, : whole * columns].unflatten(1, (whole, columns)), W[:, whole * columns :].unsqueeze(1)
    for statistic, apply in ((zero, Tensor.sub_), (scale, Tensor.mul_)):
        if statistic is None:
            continue
        each_row = statistic.repeat_interleave(rows, 0)[: len(W), :, None]
        for part, each_block in zip(parts, (each_row[:, :whole], each_row[:, whole:]), strict=True):
            if part.shape[2]:
                apply(part, each_block)
    return W


def unpack(words: Tensor, bits: int, shifts: Sequence[int]) -> list[Tensor]:
    """The codes of `bits` bits that lie `shifts` bits up in each word, as uint8: a tensor of words' shape for every shift."""
    mask = (1 << bits) - 1
    return [((words >> shift) & mask).to(torch.uint8) for shift in shifts]


def blocks(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`affine` on a weight whose statistics are scale and, or not, zero, and whose options are the block."""
    scale, *zero = weight.statistics
    return affine(weight.packed, scale, zero[0] if zero else None, weight.scheme.options, dtype)
