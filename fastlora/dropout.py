"""The dropout mask: a pure function of (seed, projection, row, column).

x is viewed as (M, in).  Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is
run with key = (low, high) 32 bits of the seed and counter = (column // 8, row, projection, 0), projection = 0 for a single
linear.  Its four words w0..w3 hold eight 16-bit lanes: lane 2i = wi & 0xffff, lane 2i + 1 = wi >> 16.  Element (row, column)
uses v = lane column % 8 & 0x7fff and is kept iff v >= t, t = round(p * 32768).  Kept elements are scaled by
32768 / (32768 - t), the inverse of the keep rate that the threshold realises, so that dropout(x) is unbiased for every p.

v has 15 bits so that a GPU compares two lanes in one instruction, as float16 numbers without their signs.

Tile shape, kernel, direction, backend and device do not enter: forward, backward, every tuning choice and the eager
reference see the same bits.  ``kernels/dropout.py`` is the same function on the device.
"""

import torch
from torch import Tensor

ROUNDS = 7
LANES = 8  # columns served by one Philox call
LANE_RANGE = 1 << 15  # values of v
_WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_LANE_BITS = 0x7FFF7FFF7FFF7FFF  # of four lanes in an int64
WEYL = (0x9E3779B9, 0xBB67AE85)
# Philox calls at a time.  On a CPU, 512 KiB per int64 temporary: a 2048 x 1024 mask takes 4.2 ms on one core, 5.6 ms at 2**14.
# An accelerator wants few launches and bounded memory.
_CPU_CALLS = 1 << 16
_DEVICE_CALLS = 1 << 23


def threshold(p: float) -> int:
    """t = round(p * 32768): what is below t is dropped.  0 means that no mask is taken, 32768 that everything is dropped."""
    return round(p * LANE_RANGE)


def keep_scale(p: float) -> float:
    """32768 / (32768 - t), the factor on kept elements; 0.0 when everything is dropped."""
    kept = LANE_RANGE - threshold(p)
    return LANE_RANGE / kept if kept else 0.0


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh seed, an int64 tensor of one element, from torch's default generator of `device`.

    Drawn on the device: no synchronisation, obeys `torch.manual_seed`, is captured by CUDA graphs, and activation
    checkpointing, which restores the generator's state, draws the same seed again.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, dtype=torch.int64)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 on int64 tensors that hold 32-bit words and broadcast against each other; returns four such tensors.

    A 32 x 32-bit product wraps in int64 to the right 64 bits, so its halves are (p >> 32) & 0xffffffff and p & 0xffffffff.
    The first two rounds mix single rows with single columns only; left unbroadcast, they cost next to nothing.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        product0, product2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c1 and c3 keep the upper half of their product: they are not multiplied before an exclusive or has been masked.
        c0, c1 = _mix(product2, c1, k0), product2
        c2, c3 = _mix(product0, c3, k1), product0
        k0, k1 = k0 + WEYL[0] & _WORD, k1 + WEYL[1] & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """(upper word of `product`) ^ word ^ key, in place from the first copy on: a quarter less time on a CPU."""
    high = product >> 32
    if high.shape == word.shape:
        return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_WORD)
    return (high ^ word ^ key) & _WORD


def keep_rows(seed: Tensor, rows: range, cols: int, p: float, projection: int = 0, dtype: torch.dtype = torch.bool) -> Tensor:
    """Rows `rows` of the mask, (len(rows), cols), 1 or True = kept, in `dtype`, computed at once on the seed's device."""
    t = threshold(p)
    if t == 0:
        return torch.ones((len(rows), cols), dtype=dtype, device=seed.device)
    calls = -(-cols // LANES)
    zero, third = seed.new_zeros((1, 1)), seed.new_full((1, 1), projection)
    row = torch.arange(rows.start, rows.stop, device=seed.device).unsqueeze(1)
    column = torch.arange(calls, device=seed.device).unsqueeze(0)
    words = philox((seed & _WORD, seed >> 32 & _WORD), (column, row, third, zero))
    # Two words an int64 hold four lanes in order.
    lanes = torch.stack((words[0] | words[1] << 32, words[2] | words[3] << 32), dim=-1) & _LANE_BITS
    lanes = lanes.view(torch.int16).view(len(rows), calls * LANES)[:, :cols]
    keep = torch.empty(lanes.shape, dtype=dtype, device=seed.device)
    return torch.gt(lanes, t - 1, out=keep)


def row_chunks(rows: int, cols: int, elements: int) -> list[range]:
    """Split `rows` rows of `cols` columns into consecutive ranges of about `elements` elements, at least one row each."""
    step = max(1, elements // max(cols, 1))
    return [range(start, min(start + step, rows)) for start in range(0, rows, step)]


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, projection: int = 0) -> Tensor:
    """The whole mask, bool (rows, cols), on the device of `seed`, int64 (1, 1).  It is made in chunks of bounded memory."""
    elements = LANES * (_CPU_CALLS if seed.device.type == "cpu" else _DEVICE_CALLS)
    chunks = [keep_rows(seed, chunk, cols, p, projection) for chunk in row_chunks(rows, cols, elements)]
    return torch.cat(chunks) if chunks else torch.empty((0, cols), dtype=torch.bool, device=seed.device)
