"""S = drop(x) Aᵀ and dS = scaling · dy B: one pass over a tall matrix, reduced along its columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, split_steps, stream_config
from fastlora.kernels.dot import dot_mixed
from fastlora.kernels.dropout import drop, keep_masks, mask_threshold
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
    MASK: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pid_k] (M, R) = scale · mask(x) Aᵀ over column blocks pid_k · steps .. (pid_k + 1) · steps."""
    K, stride_xm = in_units(K, UNIT), in_units(stride_xm, UNIT)
    stride_ar = in_units(stride_ar, UNIT_A)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_k = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = rows.to(tl.int64) if USE_INT64 else rows
    offs_r = ranks.to(tl.int64) if USE_INT64 else ranks
    if MASK != "":
        seed = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(pid_k * steps * BLOCK_K, tl.minimum(K, (pid_k + 1) * steps * BLOCK_K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        offs_k = cols.to(tl.int64) if USE_INT64 else cols
        x_tile = load_tile(x, offs_m, offs_k, stride_xm, stride_xk, M, K)
        a_tile = load_tile(A, offs_k, offs_r, stride_ak, stride_ar, K, R)
        if MASK != "":
            m0, m1, m2, m3 = keep_masks(seed, rows, start, t, BLOCK_K, MASK)
            x_tile = drop(x_tile, m0, m1, m2, m3, MASK)
        acc = dot_mixed(x_tile, a_tile, acc, PRECISION, True)
        if WAIT_FOR_DOT:
            # This select makes Triton wait for the wgmma.  Without it the next iteration overwrites the masked or rounded
            # x in registers that the wgmma may still read (Triton issue 9433).
            acc = tl.where(rows[:, None] < M, acc, 0.0)
    out_rows = (pid_k.to(tl.int64) * M + rows) * R
    out_mask = (rows[:, None] < M) & (ranks[None, :] < R)
    tl.store(out + out_rows[:, None] + ranks[None, :], acc * scale, mask=out_mask)


def plan_shrink(x: TensorSpec, A: TensorSpec, mask: str, precision: str, target: Target) -> Plan:
    """The launch for x (M, K) and A (r, K) of any strides.  Split-K makes its result come in parts."""
    (M, K), r = x.shape, A.shape[0]
    config = stream_config((M, K), r, x.dtype, A.dtype, target, aligned=fits_descriptor(x), dropout=bool(mask))
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
        "UNIT": row_unit(x),
        "UNIT_A": row_unit(A),
        "MASK": mask,
        "WAIT_FOR_DOT": (mask != "" or precision == "tf32") and target.has_register_operands,
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
    if seed is not None:
        scaling *= keep_scale(dropout_p)
    launch.launch(plan, x, A, out, seed, *plan.sizes, scaling, mask_threshold(dropout_p, plan.options["MASK"]))
    return out
