"""The keep mask on the device, as fastlora/dropout.py specifies it: applied to a tile, or packed to bits."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import MULTIPLIERS, ROUNDS, WEYL, threshold
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv
from fastlora.kernels.dot import INTERPRETED
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target

_INFINITY = 0x7C00  # of float16
_M0, _M1 = map(tl.constexpr, MULTIPLIERS)
_W0, _W1 = map(tl.constexpr, WEYL)
_ROUNDS = tl.constexpr(ROUNDS)


def mask_code(dropout_p: float, seed: object, target: Target) -> str:
    """How kernels compare a lane with t: "" takes no mask (`seed` is None), "f16x2" float16 numbers by PTX, "integer" integers.

    As float16 without its sign a lane compares with t like an integer while t is at most infinity: NaNs are above t, and kept.
    """
    if seed is None:
        return ""
    as_integers = INTERPRETED.value or not target.runs_ptx or threshold(dropout_p) > _INFINITY
    return "integer" if as_integers else "f16x2"


@triton.jit
def word_of(WORDS: tl.constexpr, i: tl.constexpr):
    """The projection word of mask i of a launch, a byte of WORDS."""
    return (WORDS >> (8 * i)) & 255


def projections(words: tuple[int, ...]) -> dict[str, int]:
    """The constexprs of a kernel for the projection words of its masks."""
    return {"COUNT": len(words), "WORDS": sum(word << 8 * i for i, word in enumerate(words))}


def mask_threshold(dropout_p: float, MASK: str) -> int:
    """t in both halves of an int32; for "integer" its distance to 2¹⁵."""
    t = threshold(dropout_p)
    half = t if MASK == "f16x2" else 0x8000 - t
    word = half << 16 | half
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    """One round on uint32 words of any shapes.  A 64-bit product is one instruction (IMAD.WIDE)."""
    p0 = c0.to(tl.uint64) * _M0
    p2 = c2.to(tl.uint64) * _M1
    return (p2 >> 32).to(tl.uint32) ^ c1 ^ k0, p2.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def keep_words(seed, rows, first_col, projection, BLOCK_K: tl.constexpr):
    """The four Philox words, (len(rows), BLOCK_K / 8) each, behind columns first_col .. first_col + BLOCK_K of `rows`.

    Columns and rows stay (1, ...) and (..., 1): the first two rounds mix single rows with single columns.
    """
    c0 = (first_col // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    c1 = rows.to(tl.uint32)[:, None]
    c2 = tl.full((1, 1), projection, tl.uint32)
    c3 = tl.full((1, 1), 0, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def keep_halves(word, t, MASK: tl.constexpr):
    """int32: 0xffff in each half of `word` that holds a kept lane, 0 in the others."""
    word = word.to(tl.int32, bitcast=True)
    if MASK == "f16x2":
        return tl.inline_asm_elementwise(
            "{.reg .b32 v; abs.f16x2 v, $1; set.geu.u32.f16x2 $0, v, $2;}", "=r,r,r", [word, t], tl.int32, is_pure=True, pack=1
        )
    return ((((word & 0x7FFF7FFF) + t) >> 15) & 0x00010001) * 0xFFFF


@triton.jit
def keep_masks(seed, rows, first_col, t, BLOCK_K: tl.constexpr, MASK: tl.constexpr, PROJECTION: tl.constexpr = 0):
    """`keep_halves` of the four words of a tile, in the mask of one projection."""
    w0, w1, w2, w3 = keep_words(seed, rows, first_col, PROJECTION, BLOCK_K)
    return keep_halves(w0, t, MASK), keep_halves(w1, t, MASK), keep_halves(w2, t, MASK), keep_halves(w3, t, MASK)


@triton.jit
def drop(x, m0, m1, m2, m3, MASK: tl.constexpr):
    """The tile x with 0 where dropped.  A thread's words give 8 neighbouring columns, those that it loads of x."""
    words = tl.join(tl.join(m0, m2), tl.join(m1, m3))  # [..., i, j] = word 2i + j
    if MASK == "f16x2":
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], (tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    lanes = tl.reshape(tl.join(low, high), x.shape)  # [..., i, j, h] = lane 4i + 2j + h
    if x.dtype.primitive_bitwidth == 32:
        kept = x.to(tl.int32, bitcast=True) & lanes.to(tl.int32)
    elif MASK == "f16x2":
        x_bits = x.to(tl.int16, bitcast=True)
        kept = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x_bits, lanes], tl.int16, is_pure=True, pack=2)
    else:
        kept = x.to(tl.int16, bitcast=True) & lanes
    return kept.to(x.dtype, bitcast=True)


@triton.jit
def keep_bytes(m0, m1, m2, m3):
    """The mask packed: bit j of byte (row, c) is column 8c + j.  The words give the bytes without a shuffle."""
    bits = (m0 & 0x00020001) | (m1 & 0x00080004) | (m2 & 0x00200010) | (m3 & 0x00800040)
    return (bits | (bits >> 16)).to(tl.uint8)


@triton.jit
def store_bytes(bits, m0, m1, m2, m3, rows, first_col, M, row_bytes, BLOCK_K: tl.constexpr):
    """Write the packed mask of a tile to bits (M, row_bytes)."""
    columns = first_col // 8 + tl.arange(0, BLOCK_K // 8)
    pointers = bits + rows[:, None].to(tl.int64) * row_bytes + columns[None, :]
    tl.store(pointers, keep_bytes(m0, m1, m2, m3), mask=(rows[:, None] < M) & (columns[None, :] < row_bytes))


@triton.jit(do_not_specialize=["M", "t"], do_not_specialize_on_alignment=["seed"])
def pack_bits_kernel(bits, seed, M, row_bytes, t, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr):
    """bits (M, row_bytes) uint8: the packed mask."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_K
    m0, m1, m2, m3 = keep_masks(tl.load(seed), rows, first_col, t, BLOCK_K, MASK)
    store_bytes(bits, m0, m1, m2, m3, rows, first_col, M, row_bytes, BLOCK_K)


def packed_mask(shape: Sequence[int]) -> Result:
    """The packed mask of an activation of `shape` (M, K): uint8 (M, ⌈K / 8⌉)."""
    return Result((shape[0], cdiv(shape[1], 8)), torch.uint8)


def plan_pack_bits(shape: Sequence[int], mask: str, block_m: int = 32, block_k: int = 256) -> Plan:
    """The launch for an activation of `shape`."""
    bits = packed_mask(shape)
    options = {"BLOCK_M": block_m, "BLOCK_K": block_k, "MASK": mask, "num_warps": 4, "num_stages": 1}
    return Plan(pack_bits_kernel, (cdiv(shape[0], block_m), cdiv(shape[1], block_k)), bits.shape, options, (bits,))


def pack_bits(plan: Plan, seed: Tensor, dropout_p: float) -> Tensor:
    """The packed keep mask, for a backward that does not stream x."""
    bits = plan.results[0].empty(seed.device)
    launch.launch(plan, bits, seed, *plan.sizes, mask_threshold(dropout_p, plan.options["MASK"]))
    return bits
