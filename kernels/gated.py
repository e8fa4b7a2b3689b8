"""The middle of a gated MLP, y = down(act(gate(x)) · up(x)), in one pass each way, with e = gate(x) and g = up(x):

    forward    h = act(e) · g                    rounded once
               S = c · mask(h) Aᵀ                of down's adapter
    backward   dh = dy W + c · mask(dS A)        dy W is given
               dg = dh · act(e)
               de = dh · g · act'(e)
               dA = c · dSᵀ mask(h)              h is made again

Nothing of S, dS and dA is computed where down has no adapter.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import DOWN, keep_scale
from fastlora.kernels import launch
from fastlora.kernels.activations import activation_parts
from fastlora.kernels.config import StreamConfig, cdiv, rank_block, split_steps, stream_config
from fastlora.kernels.dot import TRITON_DTYPES, dot_mixed, lora_dot, lora_hi_lo, lora_tile, round_to
from fastlora.kernels.dropout import drop, keep_masks, mask_threshold
from fastlora.kernels.grad_a import DX_RANKS
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, in_units, load_tile, needs_int64, row_unit

_WORD = tl.constexpr(DOWN)


@triton.jit(do_not_specialize=["M", "steps", "t"], do_not_specialize_on_alignment=["seed"])
def gated_kernel(
    e,
    g,
    h,
    A,
    S,
    seed,
    M,
    K,
    steps,
    stride_ar,
    stride_ak,
    scale,
    t,
    R: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    """h (M, K) and S[pid_k] (M, R) = scale · mask(h) Aᵀ over column blocks pid_k · steps .. (pid_k + 1) · steps."""
    K, stride_ar = in_units(K, UNIT), in_units(stride_ar, UNIT_A)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_k = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = rows.to(tl.int64) if USE_INT64 else rows
    offs_r = ranks.to(tl.int64) if USE_INT64 else ranks
    rank_block = tl.program_id(2) if R > BLOCK_R else 0
    if MASK != "":
        seed = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(pid_k * steps * BLOCK_K, tl.minimum(K, (pid_k + 1) * steps * BLOCK_K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        offs_k = cols.to(tl.int64) if USE_INT64 else cols
        e_tile = load_tile(e, offs_m, offs_k, K, 1, M, K).to(tl.float32)
        g_tile = load_tile(g, offs_m, offs_k, K, 1, M, K).to(tl.float32)
        q, _ = activation_parts(e_tile, ACTIVATION)
        h_tile = round_to(e_tile * q * g_tile, h.dtype.element_ty)
        if rank_block == 0:
            inside = (rows[:, None] < M) & (cols[None, :] < K)
            tl.store(h + offs_m[:, None] * K + offs_k[None, :], h_tile, mask=inside)
        if R > 0:
            a_tile = load_tile(A, offs_k, offs_r, stride_ak, stride_ar, K, R)
            if MASK != "":
                m0, m1, m2, m3 = keep_masks(seed, rows, start, t, BLOCK_K, MASK, _WORD)
                h_tile = drop(h_tile, m0, m1, m2, m3, MASK)
            acc = dot_mixed(h_tile, a_tile, acc, PRECISION, True)
            if WAIT_FOR_DOT:
                acc = tl.where(rows[:, None] < M, acc, 0.0)  # for the reason given in shrink.py: h is made in registers
    if R > 0:
        s_rows = (pid_k.to(tl.int64) * M + rows) * R
        s_mask = (rows[:, None] < M) & (ranks[None, :] < R)
        tl.store(S + s_rows[:, None] + ranks[None, :], acc * scale, mask=s_mask)


@triton.jit(do_not_specialize=["M", "steps", "t"], do_not_specialize_on_alignment=["seed"])
def gated_backward_kernel(
    dh,
    e,
    g,
    de,
    dS,
    A,
    dA,
    seed,
    M,
    K,
    steps,
    stride_ar,
    stride_ak,
    keep_scale,
    t,
    R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DX_R: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    HI_LO: tl.constexpr,
    LORA_HI_LO: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dA[pid_m] (R, K) = keep_scale · dSᵀ mask(h) over row blocks pid_m · steps .. (pid_m + 1) · steps.

    The programs of the first rank block write de (M, K), and dg (M, K) over dh, which holds dy W: a tile of it is read and
    written by one program.
    """
    K = in_units(K, UNIT)
    first_col = tl.program_id(0) * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    pid_m = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = cols.to(tl.int64) if USE_INT64 else cols
    if MASK != "":
        seed = tl.load(seed)
    rank_block = tl.program_id(2) if R > BLOCK_R else 0  # a constant with one rank block, as in grad_a.py
    if R > 0 and R <= BLOCK_R:
        a_tile = load_tile(A, ranks.to(offs_k.dtype), offs_k, stride_ar, stride_ak, R, K)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(pid_m * steps * BLOCK_M, tl.minimum(M, (pid_m + 1) * steps * BLOCK_M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offs_m = rows.to(tl.int64) if USE_INT64 else rows
        e_tile = load_tile(e, offs_m, offs_k, K, 1, M, K).to(tl.float32)
        g_tile = load_tile(g, offs_m, offs_k, K, 1, M, K).to(tl.float32)
        q, slope = activation_parts(e_tile, ACTIVATION)
        act = e_tile * q
        if MASK != "":
            m0, m1, m2, m3 = keep_masks(seed, rows, first_col, t, BLOCK_K, MASK, _WORD)
        if R > 0:
            ds_tile = load_tile(dS, offs_m, ranks, R, 1, M, R)
        if rank_block == 0:
            dh_tile = load_tile(dh, offs_m, offs_k, K, 1, M, K).to(tl.float32)
            if R > 0:
                if R <= BLOCK_R:
                    zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    term = lora_dot(ds_tile, a_tile, zeros, keep_scale, PRECISION, DTYPE, LORA_HI_LO)
                else:
                    term = lora_tile(
                        dS, A, offs_m, offs_k, M, K, stride_ar, stride_ak, keep_scale, R, DX_R, PRECISION, DTYPE, LORA_HI_LO
                    )
                if MASK != "":
                    term = drop(term, m0, m1, m2, m3, MASK)
                dh_tile += term
            inside = (rows[:, None] < M) & (cols[None, :] < K)
            offsets = offs_m[:, None] * K + offs_k[None, :]
            tl.store(dh + offsets, round_to(dh_tile * act, DTYPE), mask=inside)
            tl.store(de + offsets, round_to(dh_tile * g_tile * (q + slope), DTYPE), mask=inside)
        if R > 0:
            h_tile = round_to(act * g_tile, DTYPE)
            if MASK != "":
                h_tile = drop(h_tile, m0, m1, m2, m3, MASK)
            acc = dot_mixed(tl.trans(h_tile), ds_tile, acc, PRECISION, HI_LO)
            if WAIT_FOR_DOT:
                acc = tl.where(cols[:, None] < K, acc, 0.0)  # for the reason given in grad_a.py
    if R > 0:
        dA += pid_m.to(tl.int64) * R * K
        pointers = dA + offs_k[:, None] + ranks.to(offs_k.dtype)[None, :] * K
        da_mask = (cols[:, None] < K) & (ranks[None, :] < R)
        tl.store(pointers, round_to(acc * keep_scale, dA.dtype.element_ty), mask=da_mask)


def _layout(
    e: TensorSpec,
    A: TensorSpec | None,
    block: tuple[int, int],
    tiles: int,
    facts: tuple[str, str, str, Target],
    **kind: bool,
) -> tuple[StreamConfig, dict[str, Any]]:
    """The tile of a kernel that streams `tiles` matrices like e (M, K) together, and the options that both kernels have.

    block: the most rows and columns.  facts: activation, mask, precision and target.
    """
    activation, mask, precision, target = facts
    r, small = (0, e.dtype) if A is None else (A.shape[0], A.dtype)
    config = stream_config(e.shape, max(r, 1), e.dtype, small, target, aligned=fits_descriptor(e), dropout=bool(mask), **kind)  # type: ignore[arg-type]  # of two sizes
    config = replace(config, block_m=min(config.block_m, block[0]), block_k=min(config.block_k, block[1]))
    if precision == "ieee" and e.dtype == torch.float32:
        config = replace(config, num_warps=8)  # dots without tensor cores take the registers
    more = (tiles - 1) * config.block_m * config.block_k * e.dtype.itemsize
    while config.num_stages > 1 and (
        config.shared_memory(e.dtype.itemsize, small.itemsize) + config.num_stages * more > target.shared_memory
    ):
        config = replace(config, num_stages=config.num_stages - 1)
    return config, {
        "R": r,
        "ACTIVATION": activation,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "UNIT": row_unit(e),
        "MASK": mask if r else "",
        "USE_INT64": needs_int64(e, A, TensorSpec.new(e.shape[0], r, dtype=torch.float32)),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Without a limit ptxas may stop at 128 or 168 registers, and spill 16 or 24 bytes (sm_80, Triton 3.7.1).
        **({"maxnreg": 255} if target.runs_ptx else {}),
    }


def plan_gated(e: TensorSpec, A: TensorSpec | None, activation: str, mask: str, precision: str, target: Target) -> Plan:
    """The launch for contiguous e and g (M, K), A (r, K) of any strides or None.  S, the second result, may come in parts."""
    M, K = e.shape
    config, options = _layout(e, A, (64, 64) if e.dtype.itemsize == 2 else (32, 32), 2, (activation, mask, precision, target))
    row_blocks, rank_blocks = cdiv(M, config.block_m), max(1, cdiv(options["R"], config.block_r))
    partial = config.block_r * 4 / (3 * config.block_k * e.dtype.itemsize)
    splits, steps = split_steps(cdiv(K, config.block_k), row_blocks * rank_blocks, target, partial)
    options |= {"UNIT_A": 1 if A is None else row_unit(A), "WAIT_FOR_DOT": target.has_register_operands}
    results = Result((M, K), e.dtype), Result((M, options["R"]), torch.float32, splits)
    strides = (0, 0) if A is None else A.stride
    return Plan(gated_kernel, (row_blocks, splits, rank_blocks), (M, K, steps, *strides), options, results)


def gated(
    plan: Plan, e: Tensor, g: Tensor, A: Tensor | None, *, seed: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(h (M, K), S (M, r) float32 or its parts), without dropout where seed is None."""
    h, S = (result.empty(e.device) for result in plan.results)
    scale = 1.0 if seed is None else keep_scale(dropout_p)
    launch.launch(plan, e, g, h, A, S, seed, *plan.sizes, scale, mask_threshold(dropout_p, plan.options["MASK"]))
    return h, S


def plan_gated_backward(
    e: TensorSpec, A: TensorSpec | None, activation: str, mask: str, precision: str, target: Target
) -> Plan:
    """The launch for contiguous dh, e and g (M, K), and A (r, K) of any strides or None.

    Its results are de and dA, in A's dtype, which may come in parts.
    """
    M, K = e.shape
    dtype = e.dtype if A is None else A.dtype
    # Half a tile of grad_a.py: a thread holds several float32 tiles.  Without wgmma, warps side by side would make each twice.
    # It is less where float32 dots take registers, and where an operand of more than 64 ranks is split.
    block = (32, 64) if target.has_wgmma else (64, 32)
    if e.dtype.itemsize == 4:
        block = (32, 32)
    elif dtype.itemsize == 4 and (0 if A is None else A.shape[0]) > 64:
        block = (16, 64)
    config, options = _layout(e, A, block, 3, (activation, mask, precision, target), with_dx=True)
    col_blocks, rank_blocks = cdiv(K, config.block_k), max(1, cdiv(options["R"], config.block_r))
    partial = config.block_r * 4 / (5 * config.block_m * e.dtype.itemsize)
    splits, steps = split_steps(cdiv(M, config.block_m), col_blocks * rank_blocks, target, partial)
    options |= {
        "DX_R": rank_block(max(options["R"], 1), DX_RANKS),
        "DTYPE": TRITON_DTYPES[e.dtype],
        "HI_LO": dtype == torch.float32,
        "LORA_HI_LO": lora_hi_lo(A, e.dtype, target),
        "WAIT_FOR_DOT": precision == "tf32" and target.has_register_operands,
    }
    results = Result((M, K), e.dtype), Result((options["R"], K), dtype, splits)
    strides = (0, 0) if A is None else A.stride
    return Plan(gated_backward_kernel, (col_blocks, splits, rank_blocks), (M, K, steps, *strides), options, results)


def gated_backward(
    plan: Plan,
    dh: Tensor,
    e: Tensor,
    g: Tensor,
    dS: Tensor | None,
    A: Tensor | None,
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(de, dg, dA or its parts) from dh = dy W, which dg overwrites, and dS (M, r), float32."""
    de, dA = (result.empty(e.device) for result in plan.results)
    scale, t = 1.0 if seed is None else keep_scale(dropout_p), mask_threshold(dropout_p, plan.options["MASK"])
    launch.launch(plan, dh, e, g, de, dS, A, dA, seed, *plan.sizes, scale, t)
    return de, dh, dA
