"""S = drop(x) Aᵀ and dS = scaling · dy B: one pass over a tall matrix, reduced along its columns.

Projections that share x share the pass: Sᵢ = dropᵢ(x) Aᵢᵀ with the mask of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, split_steps, stream_config
from fastlora.kernels.dot import accumulators, dot_mixed
from fastlora.kernels.dropout import drop, keep_masks, mask_threshold, projections, word_of
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, in_units, load_tile, needs_int64, row_unit


@triton.jit(do_not_specialize=["M", "steps", "t"], do_not_specialize_on_alignment=["seed"])
def shrink_kernel(
    x,
    A,
    out,
    seed,
    M,
    K,
    steps,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    scale,
    t,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_A: tl.constexpr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    MASK: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pid_k, i] (M, R) = scale · maskᵢ(x) Aᵢᵀ over column blocks pid_k · steps .. (pid_k + 1) · steps, i below COUNT.

    A holds the Aᵢ below each other.  Equal neighbours in WORDS share a mask.
    """
    K, stride_xm = in_units(K, UNIT), in_units(stride_xm, UNIT)
    stride_ar = in_units(stride_ar, UNIT_A)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_k = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = rows.to(tl.int64) if USE_INT64 else rows
    offs_r = ranks.to(tl.int64) if USE_INT64 else ranks
    if MASK != "":
        seed = tl.load(seed)
    accs = accumulators(COUNT, BLOCK_M, BLOCK_R)
    for start in range(pid_k * steps * BLOCK_K, tl.minimum(K, (pid_k + 1) * steps * BLOCK_K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        offs_k = cols.to(tl.int64) if USE_INT64 else cols
        x_tile = load_tile(x, offs_m, offs_k, stride_xm, stride_xk, M, K)
        for i in tl.static_range(COUNT):
            a_tile = load_tile(A + i * R * stride_ar, offs_k, offs_r, stride_ak, stride_ar, K, R)
            dropped = x_tile
            if MASK != "":
                if i == 0 or word_of(WORDS, i) != word_of(WORDS, i - 1):
                    m0, m1, m2, m3 = keep_masks(seed, rows, start, t, BLOCK_K, MASK, word_of(WORDS, i))
                dropped = drop(x_tile, m0, m1, m2, m3, MASK)
            acc = dot_mixed(dropped, a_tile, accs[0], PRECISION, True)
            if WAIT_FOR_DOT:
                # This select makes Triton wait for the wgmma.  Without it the next iteration overwrites the masked or rounded
                # x in registers that the wgmma may still read (Triton issue 9433).
                acc = tl.where(rows[:, None] < M, acc, 0.0)
            accs = accs[1:] + (acc,)  # the next one is the first
    out_mask = (rows[:, None] < M) & (ranks[None, :] < R)
    for i in tl.static_range(COUNT):
        out_rows = ((pid_k.to(tl.int64) * COUNT + i) * M + rows) * R
        tl.store(out + out_rows[:, None] + ranks[None, :], accs[i] * scale, mask=out_mask)


def plan_shrink(
    x: TensorSpec, A: TensorSpec, mask: str, precision: str, target: Target, *, words: tuple[int, ...] = (0,)
) -> Plan:
    """The launch for x (M, K) and A (n · r, K) of any strides, n = len(words).  Split-K makes its result come in parts.

    words: the projection word of each mask, at most four.  With one projection the result is (M, r), else (n, M, r).
    """
    (M, K), n = x.shape, len(words)
    r = A.shape[0] // n
    config = stream_config((M, K), r, x.dtype, A.dtype, target, aligned=fits_descriptor(x), dropout=bool(mask), masks=n)
    row_blocks, rank_blocks = cdiv(M, config.block_m), cdiv(r, config.block_r)
    splits, steps = split_steps(
        cdiv(K, config.block_k),
        row_blocks * rank_blocks,
        target,
        n * config.block_r * 4 / (config.block_k * x.dtype.itemsize),
        config.programs_per_sm(target, x.dtype.itemsize, A.dtype.itemsize),
    )
    options = {
        "R": r,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "UNIT": row_unit(x),
        "UNIT_A": row_unit(A),
        **projections(words),
        "MASK": mask,
        "WAIT_FOR_DOT": (mask != "" or precision == "tf32") and target.has_register_operands,
        "USE_INT64": needs_int64(x, A),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid, sizes = (row_blocks, splits, rank_blocks), (M, K, steps, *x.stride, *A.stride)
    shape = (M, r) if n == 1 else (n, M, r)
    return Plan(shrink_kernel, grid, sizes, options, (Result(shape, torch.float32, splits),))


def shrink(
    plan: Plan, x: Tensor, A: Tensor, *, scaling: float = 1.0, seed: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """scaling · drop(x) Aᵀ, float32, without dropout where seed is None.  The plan has A's layout: Bᵀ may be given as B."""
    out = plan.results[0].empty(x.device)
    if seed is not None:
        scaling *= keep_scale(dropout_p)
    launch.launch(plan, x, A, out, seed, *plan.sizes, scaling, mask_threshold(dropout_p, plan.options["MASK"]))
    return out
