"""dA = dSᵀ drop(x) and dB = scaling · dyᵀ S: one pass over a tall matrix, reduced along its rows.

The pass has the mask of dA at hand.  For the fused GEMM of dx it packs the mask to bits.  For cuBLAS it writes the LoRA term
c · mask(dS A) into dx, and cuBLAS accumulates dy W onto it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels import launch
from fastlora.kernels.config import cdiv, rank_block, split_steps, stream_config
from fastlora.kernels.dot import TRITON_DTYPES, dot_mixed, lora_dot, lora_hi_lo, lora_tile, round_to
from fastlora.kernels.dropout import drop, keep_masks, mask_threshold, packed_mask, store_bytes
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, in_units, load_tile, needs_int64, row_unit

DX_RANKS = 32  # ranks a step of dx's LoRA term: that tile of V stays in registers


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
    MASK: tl.constexpr,
    PACK: tl.constexpr,
    WITH_DX: tl.constexpr,
    HI_LO: tl.constexpr,
    LORA_HI_LO: tl.constexpr,
    WAIT_FOR_DOT: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pid_m] (R, K) = scale · Uᵀ mask(x) over row blocks pid_m · steps .. (pid_m + 1) · steps.

    The programs of the first rank block also write bits = the packed mask (PACK) or dx (M, K) = mask(keep_scale · U V)
    (WITH_DX).  row_bytes is not specialised: as a multiple of 16 it makes Triton give the store of bits its own layout and
    compute Philox a second time (20.8 instructions an element on sm_90 instead of 14.3).
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
    if WITH_DX and R <= BLOCK_R:
        v_tile = load_tile(V, ranks.to(offs_k.dtype), offs_k, stride_vr, stride_vk, R, K)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(pid_m * steps * BLOCK_M, tl.minimum(M, (pid_m + 1) * steps * BLOCK_M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offs_m = rows.to(tl.int64) if USE_INT64 else rows
        x_tile = load_tile(x, offs_m, offs_k, stride_xm, stride_xk, M, K)
        u_tile = load_tile(U, offs_m, ranks, R, 1, M, R)
        if MASK != "":
            first_col = tl.program_id(0) * BLOCK_K
            m0, m1, m2, m3 = keep_masks(seed, rows, first_col, t, BLOCK_K, MASK)
            x_tile = drop(x_tile, m0, m1, m2, m3, MASK)
            if PACK:
                if rank_block == 0:
                    store_bytes(bits, m0, m1, m2, m3, rows, first_col, M, row_bytes, BLOCK_K)
        if WITH_DX:
            if rank_block == 0:
                if R <= BLOCK_R:
                    zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    dx_tile = lora_dot(u_tile, v_tile, zeros, keep_scale, PRECISION, DTYPE, LORA_HI_LO)
                else:
                    dx_tile = lora_tile(
                        U, V, offs_m, offs_k, M, K, stride_vr, stride_vk, keep_scale, R, DX_R, PRECISION, DTYPE, LORA_HI_LO
                    )
                dx_tile = round_to(dx_tile, DTYPE)
                if MASK != "":
                    dx_tile = drop(dx_tile, m0, m1, m2, m3, MASK)
                inside = (rows[:, None] < M) & (cols[None, :] < K)
                tl.store(dx + offs_m[:, None].to(tl.int64) * K + offs_k[None, :], dx_tile, mask=inside)
        acc = dot_mixed(tl.trans(x_tile), u_tile, acc, PRECISION, HI_LO)
        if WAIT_FOR_DOT:
            # This select makes Triton wait for the wgmma.  Without it the copy of a later U lands in the buffer that the wgmma
            # still reads (Triton 3.6 and 3.7); only in tf32 is U itself an operand of wgmma.
            acc = tl.where(cols[:, None] < K, acc, 0.0)
    out += pid_m.to(tl.int64) * R * K
    out_mask = (cols[:, None] < K) & (ranks[None, :] < R)
    tl.store(
        out + offs_k[:, None] * stride_ok + ranks.to(offs_k.dtype)[None, :] * stride_or,
        round_to(acc * scale, out.dtype.element_ty),
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
) -> Plan:
    """The launch for x (M, K) and a contiguous U (M, r).

    Its first result is (r, K), or (K, r) with `transposed`, in `dtype`, and may come in parts.  With `pack`, which needs
    a `mask`, the packed mask is a second one.  With V (r, K) the launch also writes drop(U V) (M, K).
    """
    (M, K), r, with_dx = x.shape, U.shape[1], V is not None
    config = stream_config((M, K), r, x.dtype, U.dtype, target, aligned=fits_descriptor(x), dropout=bool(mask), with_dx=with_dx)
    col_blocks, rank_blocks = cdiv(K, config.block_k), cdiv(r, config.block_r)
    splits, steps = split_steps(
        cdiv(M, config.block_m), col_blocks * rank_blocks, target, config.block_r * 4 / (config.block_m * x.dtype.itemsize)
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
        "MASK": mask,
        "PACK": pack,
        "WITH_DX": with_dx,
        "HI_LO": dtype == torch.float32,
        "LORA_HI_LO": with_dx and lora_hi_lo(V, x.dtype, target),
        "WAIT_FOR_DOT": precision == "tf32" and target.has_register_operands,
        "USE_INT64": needs_int64(x, U, V, TensorSpec.new(r, K, dtype=dtype)),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **target.register_limit,
    }
    sizes = (M, K, steps, bits.shape[1] if pack else 0, *x.stride, *out_strides, *((0, 0) if V is None else V.stride))
    out = Result((K, r) if transposed else (r, K), dtype, splits)
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
