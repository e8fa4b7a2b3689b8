"""dA = dSᵀ drop(x) and dB = scaling · dyᵀ S: one pass over a tall matrix, reduced along its rows.

The pass has the mask of dA at hand.  For the fused GEMM of dx it packs the mask to bits.  For cuBLAS it writes the LoRA term
c · mask(dS A) into dx, and cuBLAS accumulates dy W onto it.

Projections that share x share the pass: dAᵢ = dSᵢᵀ dropᵢ(x), and dx's term is Σ c · maskᵢ(dSᵢ Aᵢ).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, rank_block, split_steps, stream_config
from fastlora.kernels.dot import TRITON_DTYPES, accumulators, dot_mixed, lora_dot, lora_hi_lo, lora_tile, round_to
from fastlora.kernels.dropout import (
    drop,
    keep_masks,
    mask_threshold,
    packed_mask,
    projections,
    store_bytes,
    word_of,
)
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, in_units, load_tile, needs_int64, row_unit

DX_RANKS = 32  # ranks a step of dx's LoRA term: that tile of V stays in registers


@triton.jit
def lora_term(
    u_tile, v_tiles, U, V, rows, cols, M, K, stride_vr, stride_vk, alpha, INDEX: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, HI_LO: tl.constexpr,
):  # fmt: skip
    """alpha · U V of one tile, float32: of u_tile and v_tiles[INDEX] where these hold all R ranks, else by `lora_tile`."""
    if R <= u_tile.shape[1]:
        zeros = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        term = lora_dot(u_tile, v_tiles[INDEX], zeros, alpha, PRECISION, OPERAND, HI_LO)
    else:  # not after a return: Triton would compile both
        term = lora_tile(U, V, rows, cols, M, K, stride_vr, stride_vk, alpha, R, BLOCK_R, PRECISION, OPERAND, HI_LO)
    return term


@triton.jit
def store_dx(dx, tile, rows, cols, M, K, ADD: tl.constexpr, DTYPE: tl.constexpr, USE_INT64: tl.constexpr):
    """Write a tile of dx (M, K), contiguous, or with ADD add it to what dx holds."""
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    pointers = dx + rows[:, None].to(tl.int64) * K + (cols.to(tl.int64) if USE_INT64 else cols)[None, :]
    if ADD:
        tile += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, round_to(tile, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["M", "steps", "row_bytes", "t"], do_not_specialize_on_alignment=["seed"])
def grad_a_kernel(
    x,
    U,
    out,
    bits,
    V,
    dx,
    seed,
    M,
    K,
    steps,
    row_bytes,
    stride_xm,
    stride_xk,
    stride_or,
    stride_ok,
    stride_vr,
    stride_vk,
    scale,
    keep_scale,
    t,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DX_R: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    MASK: tl.constexpr,
    PACK: tl.constexpr,
    WITH_DX: tl.constexpr,
    ADD_DX: tl.constexpr,
    HI_LO: tl.constexpr,
    LORA_HI_LO: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pid_m, i] (R, K) = scale · Uᵢᵀ maskᵢ(x) over row blocks pid_m · steps .. (pid_m + 1) · steps, i below COUNT.

    The programs of the first rank block also write bits = the packed mask (PACK, COUNT = 1) or
    dx (M, K) = Σ maskᵢ(keep_scale · Uᵢ Vᵢ) (WITH_DX), which ADD_DX adds to what dx holds.  V holds the Vᵢ below each other.
    Equal neighbours in WORDS share a mask.

    row_bytes is not specialised: as a multiple of 16 it makes Triton give the store of bits its own layout and compute Philox
    a second time (20.8 instructions an element on sm_90 instead of 14.3).
    """
    K, stride_xm = in_units(K, UNIT), in_units(stride_xm, UNIT)
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    pid_m = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = cols.to(tl.int64) if USE_INT64 else cols
    if MASK != "":
        seed = tl.load(seed)
    # A constant with one rank block: a branch or a loop in the loop over rows keeps Triton from pipelining its loads.
    rank_block = tl.program_id(2) if R > BLOCK_R else 0
    v_tiles = ()
    if WITH_DX and R <= BLOCK_R:
        for i in tl.static_range(COUNT):
            v_tile = load_tile(V + i * R * stride_vr, ranks.to(offs_k.dtype), offs_k, stride_vr, stride_vk, R, K)
            v_tiles = v_tiles + (v_tile,)  # type: ignore[assignment]  # the tuple grows
    accs = accumulators(COUNT, BLOCK_K, BLOCK_R)
    for start in range(pid_m * steps * BLOCK_M, tl.minimum(M, (pid_m + 1) * steps * BLOCK_M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offs_m = rows.to(tl.int64) if USE_INT64 else rows
        x_tile = load_tile(x, offs_m, offs_k, stride_xm, stride_xk, M, K)
        first_col = tl.program_id(0) * BLOCK_K
        dx_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(COUNT):
            Ui = U + M.to(tl.int64) * (i * R)
            u_tile = load_tile(Ui, offs_m, ranks, R, 1, M, R)
            dropped = x_tile
            if MASK != "":
                if i == 0 or word_of(WORDS, i) != word_of(WORDS, i - 1):
                    m0, m1, m2, m3 = keep_masks(seed, rows, first_col, t, BLOCK_K, MASK, word_of(WORDS, i))
                dropped = drop(x_tile, m0, m1, m2, m3, MASK)
                if PACK:
                    if rank_block == 0:
                        store_bytes(bits, m0, m1, m2, m3, rows, first_col, M, row_bytes, BLOCK_K)
            if WITH_DX:
                if rank_block == 0:
                    term = lora_term(
                        u_tile, v_tiles, Ui, V + i * R * stride_vr, offs_m, offs_k, M, K, stride_vr, stride_vk, keep_scale,
                        i, R, DX_R, PRECISION, DTYPE, LORA_HI_LO,
                    )  # fmt: skip
                    if COUNT == 1 and not ADD_DX:
                        term = round_to(term, DTYPE)  # before the mask, which takes half the instructions in 16 bits
                    if MASK != "":
                        term = drop(term, m0, m1, m2, m3, MASK)
                    term = term if i == 0 else dx_tile + term
                    if i < COUNT - 1:
                        dx_tile = term
                    else:
                        store_dx(dx, term, rows, cols, M, K, ADD_DX, DTYPE, USE_INT64)
            acc = dot_mixed(tl.trans(dropped), u_tile, accs[0], PRECISION, HI_LO)
            if WAIT_FOR_DOT:
                # This select makes Triton wait for the wgmma.  Without it the copy of a later U lands in the buffer that the
                # wgmma still reads (Triton 3.6 and 3.7); only in tf32 is U itself an operand of wgmma.
                acc = tl.where(cols[:, None] < K, acc, 0.0)
            accs = accs[1:] + (acc,)  # the next one is the first
    out_mask = (cols[:, None] < K) & (ranks[None, :] < R)
    for i in tl.static_range(COUNT):
        parts = out + (pid_m * COUNT + i).to(tl.int64) * R * K
        tl.store(
            parts + offs_k[:, None] * stride_ok + ranks.to(offs_k.dtype)[None, :] * stride_or,
            round_to(accs[i] * scale, out.dtype.element_ty),
            mask=out_mask,
        )


def plan_grad_a(
    x: TensorSpec,
    U: TensorSpec,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    *,
    transposed: bool = False,
    mask: str = "",
    pack: bool = False,
    V: TensorSpec | None = None,
    add: bool = False,
    words: tuple[int, ...] = (0,),
) -> Plan:
    """The launch for x (M, K) and a contiguous U (n · M, r), n = len(words).

    Its first result is (r, K), or (K, r) with `transposed`, in `dtype`, and may come in parts.  With `pack`, which needs
    a `mask` and one projection, the packed mask is a second one.  With V (n · r, K) the launch also writes drop(U V) (M, K), or
    adds it with `add` to what is there.  For several projections the results get n as their first dimension.

    words: the projection word of each mask, at most four, each with accumulators in registers.
    """
    (M, K), r, n, with_dx = x.shape, U.shape[1], len(words), V is not None
    kind: dict[str, Any] = {"dropout": bool(mask), "with_dx": with_dx, "masks": n}
    config = stream_config((M, K), r, x.dtype, U.dtype, target, aligned=fits_descriptor(x), **kind)
    col_blocks, rank_blocks = cdiv(K, config.block_k), max(1, cdiv(r, config.block_r))
    splits, steps = split_steps(
        cdiv(M, config.block_m), col_blocks * rank_blocks, target, n * config.block_r * 4 / (config.block_m * x.dtype.itemsize)
    )
    out_strides = (1, r) if transposed else (K, 1)
    bits = packed_mask((M, K))
    options = {
        "R": r,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "DX_R": rank_block(r, DX_RANKS),
        "DTYPE": TRITON_DTYPES[x.dtype],
        "UNIT": row_unit(x),
        **projections(words),
        "MASK": mask,
        "PACK": pack,
        "WITH_DX": with_dx,
        "ADD_DX": add,
        "HI_LO": dtype == torch.float32,
        "LORA_HI_LO": with_dx and lora_hi_lo(V, x.dtype, target),
        "WAIT_FOR_DOT": precision == "tf32" and target.has_register_operands,
        "USE_INT64": needs_int64(x, U, V, TensorSpec.new(n * r, K, dtype=dtype)),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **target.register_limit,
    }
    sizes = (M, K, steps, bits.shape[1] if pack else 0, *x.stride, *out_strides, *((0, 0) if V is None else V.stride))
    shape = (K, r) if transposed else (r, K)
    out = Result(shape if n == 1 else (n, *shape), dtype, splits)
    return Plan(grad_a_kernel, (col_blocks, splits, rank_blocks), sizes, options, (out, bits) if pack else (out,))


def grad_a(
    plan: Plan,
    x: Tensor,
    U: Tensor,
    V: Tensor | None = None,
    *,
    scaling: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(scaling · Uᵀ drop(x), the packed mask where the plan packs it), from a float32 U.

    With a `dx` (M, K), contiguous, drop(U V) is written to it; the plan has V's layout.  A float32 result keeps float32
    quality: U is split in two.  For a 16-bit result U is rounded to x's dtype.
    """
    out = plan.results[0].empty(x.device)
    bits = plan.results[1].empty(x.device) if plan.options["PACK"] else None
    scale = 1.0 if seed is None else keep_scale(dropout_p)
    t = mask_threshold(dropout_p, plan.options["MASK"])
    launch.launch(plan, x, U, out, bits, V, dx, seed, *plan.sizes, scaling * scale, scale, t)
    return out, bits
