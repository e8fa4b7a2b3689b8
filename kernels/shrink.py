"""S = drop(x) Aᵀ and dS = scaling · dy B: one pass over a tall matrix, reduced along its columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, split_steps, stream_config
from fastlora.kernels.dot import dot_mixed
from fastlora.kernels.dropout import keep_tile, keep_words, lane_limit
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, needs_int64


@triton.jit(do_not_specialize=["M", "steps", "limit"], do_not_specialize_on_alignment=["seed"])
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
    limit,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pid_k] (M, R) = scale · mask(x) Aᵀ over column blocks pid_k · steps .. (pid_k + 1) · steps."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_k = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = rows.to(tl.int64) if USE_INT64 else rows
    offs_r = ranks.to(tl.int64) if USE_INT64 else ranks
    if HAS_DROPOUT:
        seed = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(pid_k * steps * BLOCK_K, tl.minimum(K, (pid_k + 1) * steps * BLOCK_K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        offs_k = cols.to(tl.int64) if USE_INT64 else cols
        x_mask = (rows[:, None] < M) & (cols[None, :] < K)
        x_tile = tl.load(x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)
        a_mask = (cols[:, None] < K) & (ranks[None, :] < R)
        a_tile = tl.load(A + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak, mask=a_mask, other=0.0)
        if HAS_DROPOUT:
            w0, w1, w2, w3 = keep_words(seed, rows, start, BLOCK_K)
            x_tile = tl.where(keep_tile(w0, w1, w2, w3, limit, BLOCK_M, BLOCK_K), x_tile, 0.0)
        acc = dot_mixed(x_tile, a_tile, acc, PRECISION, True)
        if WAIT_FOR_DOT:
            # This select makes Triton wait for the wgmma.  Without it the next iteration overwrites the masked or rounded
            # x in registers that the wgmma may still read (Triton issue 9433).
            acc = tl.where(rows[:, None] < M, acc, 0.0)
    out_rows = (pid_k.to(tl.int64) * M + rows) * R
    out_mask = (rows[:, None] < M) & (ranks[None, :] < R)
    tl.store(out + out_rows[:, None] + ranks[None, :], acc * scale, mask=out_mask)


def plan_shrink(x: TensorSpec, A: TensorSpec, dropout: bool, precision: str, target: Target) -> Plan:
    """The launch for x (M, K) and A (r, K) of any strides.  Split-K makes its result come in parts."""
    (M, K), r = x.shape, A.shape[0]
    config = stream_config((M, K), r, x.dtype, A.dtype, target, aligned=fits_descriptor(x), dropout=dropout)
    row_blocks, rank_blocks = cdiv(M, config.block_m), cdiv(r, config.block_r)
    splits, steps = split_steps(
        cdiv(K, config.block_k),
        row_blocks * rank_blocks,
        target,
        config.block_r * 4 / (config.block_k * x.dtype.itemsize),
        config.programs_per_sm(target, x.dtype.itemsize, A.dtype.itemsize),
    )
    options = {
        "R": r,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "HAS_DROPOUT": dropout,
        "WAIT_FOR_DOT": (dropout or precision == "tf32") and target.has_register_operands,
        "USE_INT64": needs_int64(x, A),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid, sizes = (row_blocks, splits, rank_blocks), (M, K, steps, *x.stride, *A.stride)
    return Plan(shrink_kernel, grid, sizes, options, (Result((M, r), torch.float32, splits),))


def shrink(
    plan: Plan, x: Tensor, A: Tensor, *, scaling: float = 1.0, seed: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """scaling · drop(x) Aᵀ, float32, without dropout where seed is None.  The plan has A's layout: Bᵀ may be given as B."""
    out = plan.results[0].empty(x.device)
    scale, limit = (scaling, 0) if seed is None else (scaling * keep_scale(dropout_p), lane_limit(dropout_p))
    launch.launch(plan, x, A, out, seed, *plan.sizes, scale, limit)
    return out
