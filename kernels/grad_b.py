"""dS = scaling · dy B and dB = scaling · dyᵀ S together: one pass over dy, reduced along both its axes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, split_steps, super_tile_config
from fastlora.kernels.dot import dot_mixed, round_to
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, in_units, load_tile, needs_int64, row_unit

MAX_RANK = 32  # above it the partial dS, one for each block of dy's columns, cost as much as a second pass over dy


@triton.jit(do_not_specialize=["M", "steps"])
def grad_b_kernel(
    dy,
    B,
    S,
    dS,
    dB,
    M,
    N,
    steps,
    stride_ym,
    stride_yn,
    stride_bn,
    stride_br,
    scale,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIT: tl.constexpr,
    HI_LO: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One super-tile's share of dS and dB: row blocks pid_m · steps .. (pid_m + 1) · steps of one block of columns.

    dS[pid_n] (M, R) and dB[pid_m] (N, R) are float32 partial sums.
    """
    N, stride_ym = in_units(N, UNIT), in_units(stride_ym, UNIT)
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    offs_n = cols.to(tl.int64) if USE_INT64 else cols
    offs_r = ranks.to(tl.int64) if USE_INT64 else ranks
    nr_mask = (cols[:, None] < N) & (ranks[None, :] < R)
    b_tile = tl.load(B + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=nr_mask, other=0.0)
    dS += pid_n.to(tl.int64) * M * R
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(pid_m * steps * BLOCK_M, tl.minimum(M, (pid_m + 1) * steps * BLOCK_M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offs_m = rows.to(tl.int64) if USE_INT64 else rows
        y_tile = load_tile(dy, offs_m, offs_n, stride_ym, stride_yn, M, N)
        s_offs = offs_m[:, None] * R + ranks[None, :]
        s_mask = (rows[:, None] < M) & (ranks[None, :] < R)
        ds_tile = dot_mixed(y_tile, b_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION, True)
        tl.store(dS + s_offs, ds_tile * scale, mask=s_mask)
        s_tile = tl.load(S + s_offs, mask=s_mask, other=0.0)
        acc = dot_mixed(tl.trans(y_tile), s_tile, acc, PRECISION, HI_LO)
    dB += pid_m.to(tl.int64) * N * R
    tl.store(dB + offs_n[:, None] * R + ranks[None, :], round_to(acc * scale, dB.dtype.element_ty), mask=nr_mask)


def plan_grad_s_and_b(dy: TensorSpec, B: TensorSpec, S: TensorSpec, dtype: torch.dtype, precision: str, target: Target) -> Plan:
    """The launch for dy (M, N), B (N, r) and a contiguous S (M, r), r at most MAX_RANK.  Both results may come in parts."""
    (M, N), r = dy.shape, B.shape[1]
    config = super_tile_config((M, N), r, dy.dtype, B.dtype, target)
    col_blocks = max(1, cdiv(N, config.block_k))  # with N = 0, one program still writes dS = 0
    partial = config.block_r * 4 / (config.block_m * dy.dtype.itemsize)
    # Without wgmma, dy's loads wait in registers for the two layouts of the dots.  Only a second program hides them.
    programs_per_sm = 1 if target.has_wgmma else 2
    splits, steps = split_steps(cdiv(M, config.block_m), col_blocks, target, partial, programs_per_sm)
    options = {
        "R": r,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_k,
        "BLOCK_R": config.block_r,
        "UNIT": row_unit(dy),
        "HI_LO": dtype == torch.float32,
        "USE_INT64": needs_int64(dy, B, S, TensorSpec.new(N, r, dtype=dtype)),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    results = Result((M, r), torch.float32, col_blocks), Result((N, r), dtype, splits)
    return Plan(grad_b_kernel, (col_blocks, splits), (M, N, steps, *dy.stride, *B.stride), options, results)


def grad_s_and_b(plan: Plan, dy: Tensor, B: Tensor, S: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """(dS float32 (M, r), dB (N, r) in the plan's dtype)."""
    dS, dB = (result.empty(dy.device) for result in plan.results)
    launch.launch(plan, dy, B, S, dS, dB, *plan.sizes, scaling)
    return dS, dB
