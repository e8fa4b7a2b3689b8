"""The keep mask on the device, as fastlora/dropout.py specifies it: a tile of booleans, or packed bits."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import threshold
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv
from fastlora.kernels.launch import Plan, Result


def lane_limit(dropout_p: float) -> int:
    """t · 2¹⁶ − 1 as the bits of an int32.

    lane >= t is tested as (lane · 2¹⁶ + lower bits) > limit, unsigned, so that an upper lane is compared where it lies in its
    word.  t >= 1: t = 0 takes no mask.
    """
    limit = (threshold(dropout_p) << 16) - 1
    return limit - (1 << 32) if limit >= 1 << 31 else limit


@triton.jit
def keep_words(seed, rows, first_col, BLOCK_K: tl.constexpr):
    """The four Philox words, (len(rows), BLOCK_K / 8) each, behind columns first_col .. first_col + BLOCK_K of `rows`."""
    calls = first_col // 8 + tl.arange(0, BLOCK_K // 8)
    return tl.philox(seed, calls[None, :], rows[:, None], 0, 0, 7)


@triton.jit
def keep_tile(w0, w1, w2, w3, limit, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Booleans (BLOCK_M, BLOCK_K), True = kept.  A thread's words give 8 neighbouring columns, those that it loads of x."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] = word 2i + j
    lanes = tl.join(words << 16, words)  # [..., i, j, h] = lane 4i + 2j + h in the upper half
    return tl.reshape(lanes, (BLOCK_M, BLOCK_K)) > limit.to(tl.uint32, bitcast=True)


@triton.jit
def _keep_pair(word, limit):
    limit = limit.to(tl.uint32, bitcast=True)
    return ((word << 16) > limit).to(tl.int32) | ((word > limit).to(tl.int32) << 1)


@triton.jit
def keep_bytes(w0, w1, w2, w3, limit):
    """The same booleans packed: bit j of byte (row, c) is column 8c + j.  The words give the bytes without a shuffle."""
    low = _keep_pair(w0, limit) | (_keep_pair(w1, limit) << 2)
    high = _keep_pair(w2, limit) | (_keep_pair(w3, limit) << 2)
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def store_bytes(bits, w0, w1, w2, w3, limit, rows, first_col, M, row_bytes, BLOCK_K: tl.constexpr):
    """Write the packed mask of a tile to bits (M, row_bytes)."""
    columns = first_col // 8 + tl.arange(0, BLOCK_K // 8)
    pointers = bits + rows[:, None].to(tl.int64) * row_bytes + columns[None, :]
    tl.store(pointers, keep_bytes(w0, w1, w2, w3, limit), mask=(rows[:, None] < M) & (columns[None, :] < row_bytes))


@triton.jit(do_not_specialize=["M", "limit"], do_not_specialize_on_alignment=["seed"])
def pack_bits_kernel(bits, seed, M, row_bytes, limit, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bits (M, row_bytes) uint8: the packed mask."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_K
    w0, w1, w2, w3 = keep_words(tl.load(seed), rows, first_col, BLOCK_K)
    store_bytes(bits, w0, w1, w2, w3, limit, rows, first_col, M, row_bytes, BLOCK_K)


def packed_mask(shape: Sequence[int]) -> Result:
    """The packed mask of an activation of `shape` (M, K): uint8 (M, ⌈K / 8⌉)."""
    return Result((shape[0], cdiv(shape[1], 8)), torch.uint8)


def plan_pack_bits(shape: Sequence[int], block_m: int = 32, block_k: int = 256) -> Plan:
    """The launch for an activation of `shape`."""
    bits = packed_mask(shape)
    options = {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}
    return Plan(pack_bits_kernel, (cdiv(shape[0], block_m), cdiv(shape[1], block_k)), bits.shape, options, (bits,))


def pack_bits(plan: Plan, seed: Tensor, dropout_p: float) -> Tensor:
    """The packed keep mask, for a backward that does not stream x."""
    bits = plan.results[0].empty(seed.device)
    launch.launch(plan, bits, seed, *plan.sizes, lane_limit(dropout_p))
    return bits
