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

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Word: TypeAlias = int | Tensor

ROUNDS = 7
GATE, UP, DOWN = range(3)  # the projections of a gated MLP
LANES = 8  # columns served by one Philox call
LANE_RANGE = 1 << 15  # values of v
_WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_EACH_LANE = 0x0001000100010001  # bit 0 of four lanes in an int64
_GATHER = 1 << 48 | 1 << 33 | 1 << 18 | 1 << 3  # times bits 16i of an int64: bit i goes to bit 48 + i
# Philox calls at a time.  On a CPU this is just below the 2**15 elements from which torch starts its threads: some 70 small
# parallel regions would each wait for the slowest thread of a busy machine.  A 1024 x 1024 mask takes 8 ms of one core, torch's
# own dropout, whose random numbers are not drawn in parallel either, 14 ms.  An accelerator wants few launches, bounded memory.
_CPU_CALLS = (1 << 15) - 1
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


def key_schedule(seed: Tensor) -> list[tuple[Word, Word]]:
    """The keys (k0, k1) of each round.  seed is int64 (1,): on a CPU it is read, elsewhere that would synchronise."""
    value: Word = int(seed) if seed.device.type == "cpu" else seed
    return [(value + i * WEYL[0] & _WORD, (value >> 32) + i * WEYL[1] & _WORD) for i in range(ROUNDS)]


def philox(keys: Sequence[tuple[Word, Word]], counter: Sequence[Word]) -> tuple[Word, Word, Word, Word]:
    """A round of Philox4x32 for each key, on 32-bit words: ints, and int64 tensors that broadcast against each other.

    A 32 x 32-bit product wraps in int64 to the right 64 bits, so its halves are (p >> 32) & 0xffffffff and p & 0xffffffff.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (p2 >> 32 ^ k0) & _WORD ^ c1, p2 & _WORD
        c2, c3 = (p0 >> 32 ^ k1) & _WORD ^ c3, p0 & _WORD
    return c0, c1, c2, c3


def _philox_in_place(keys: Sequence[tuple[Word, Word]], work: Tensor) -> None:
    """`philox` in place, in half the time on a CPU, where fresh memory is dear.

    work (6, ..., calls) holds the four words, and room for two products, which become words 1 and 3 of the next round: after
    an odd number of rounds, words 0 to 3 are the lower halves of work[0], work[4], work[2] and work[5].  Halves are taken as
    int32: one operation for shift, exclusive or and mask.
    """
    whole, halves = work.unbind(), work.view(torch.int32)
    low, high = halves[..., 0::2].unbind(), halves[..., 1::2].unbind()
    i1, i3, spare1, spare3 = 1, 3, 4, 5
    for k0, k1 in keys:
        torch.mul(whole[2], MULTIPLIERS[1], out=whole[spare1])
        torch.mul(whole[0], MULTIPLIERS[0], out=whole[spare3])
        torch.bitwise_xor(high[spare1], low[i1], out=low[0])
        torch.bitwise_xor(high[spare3], low[i3], out=low[2])
        whole[0].bitwise_xor_(k0)
        whole[2].bitwise_xor_(k1)
        i1, i3, spare1, spare3 = spare1, spare3, i1, i3


def packed_mask(seed: Tensor, rows: int, cols: int, p: float, projection: int = 0) -> Tensor:
    """The mask as bits, uint8 (rows, ceil(cols / 8)): bit j of byte c is column 8c + j, 1 = kept.

    seed is int64 (1,), threshold(p) at least 1; the bits are made on the seed's device.  The first two rounds mix single rows
    with single columns only and are left unbroadcast.
    """
    calls = -(-cols // LANES)
    bits = torch.empty((rows, calls), dtype=torch.uint8, device=seed.device)
    keys = key_schedule(seed)
    row, column = torch.arange(rows, device=seed.device).unsqueeze(1), torch.arange(calls, device=seed.device)
    chunks = row_chunks(rows, calls, _CPU_CALLS if seed.device.type == "cpu" else _DEVICE_CALLS)
    work = torch.empty((6, len(chunks[0]) if chunks else 0, calls), dtype=torch.int64, device=seed.device)
    for chunk in chunks:
        part = work[:, : len(chunk)]
        for i, word in enumerate(philox(keys[:2], (column, row[chunk.start : chunk.stop], projection, 0))):
            part[i] = word
        _philox_in_place(keys[2:], part)
        lanes = _kept_lanes(part[4], part[0], threshold(p)).add_(_kept_lanes(part[5], part[2], threshold(p)), alpha=16)
        bits[chunk.start : chunk.stop] = lanes.mul_(_GATHER).bitwise_right_shift_(48).bitwise_and_(0xFF)
    return bits


def _kept_lanes(odd: Tensor, even: Tensor, t: int) -> Tensor:
    """Bit 16i = whether lane i of a call's two words, `even` and `odd` in this order, is kept; over `odd`.

    Two words in an int64 hold four lanes in order.  v + 32768 - t reaches bit 15 of its lane iff v >= t.
    """
    lanes = odd.bitwise_left_shift_(32).bitwise_or_(even).bitwise_and_((LANE_RANGE - 1) * _EACH_LANE)
    return lanes.add_((LANE_RANGE - t) * _EACH_LANE).bitwise_right_shift_(15).bitwise_and_(_EACH_LANE)


def byte_masks(bits: Tensor, cols: int) -> Tensor:
    """The packed mask as int8 (rows, cols), -1 = kept and 0 = dropped.  Eight elements are looked up at once."""
    table = torch.arange(256, device=bits.device).mul_(0x0101010101010101).bitwise_and_(-0x7FBFDFEFF7FBFDFF)
    table = table.view(torch.int8).ne(0).view(torch.int8).neg_().view(torch.int64)
    return table.index_select(0, bits.flatten().int()).view(torch.int8).view(bits.shape[0], bits.shape[1] * LANES)[:, :cols]


def row_chunks(rows: int, cols: int, elements: int) -> list[range]:
    """Split `rows` rows of `cols` columns into consecutive ranges of about `elements` elements, at least one row each."""
    step = max(1, elements // max(cols, 1))
    return [range(start, min(start + step, rows)) for start in range(0, rows, step)]


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, projection: int = 0) -> Tensor:
    """The whole mask, bool (rows, cols), on the device of `seed`, int64 (1,)."""
    if threshold(p) == 0:
        return torch.ones((rows, cols), dtype=torch.bool, device=seed.device)
    return byte_masks(packed_mask(seed, rows, cols, p, projection), cols).bool()
