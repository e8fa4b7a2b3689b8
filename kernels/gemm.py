"""The two GEMMs, each with its LoRA term in the same accumulator: y = x Wᵀ + bias + scaling · S Bᵀ, dx = dy W + mask(dS A).

Both are C (M, N) = P (M, K) Q (K, N) + bias + mask(alpha · U (M, R) V (R, N)).  Forward: P = x, Q = Wᵀ, U = S, V = Bᵀ.
Backward: P = dy, Q = W, U = dS, V = A.  The rank-r product comes first and the main loop accumulates onto it, so a program
holds one accumulator.  The mask is read from packed bits.  Persistent programs walk the tiles of C in groups of GROUP_M rows.
With wgmma the next tile's loads are under way before this one is stored.

Without P and Q the same kernel writes bias + mask(alpha · U V) alone.  cuBLAS then accumulates P Q onto it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import launch
from fastlora.kernels.config import GemmConfig, cdiv, gemm_config, lora_tile_config, rank_block
from fastlora.kernels.dot import TRITON_DTYPES, dot, lora_hi_lo, lora_tile, round_to
from fastlora.kernels.dropout import packed_mask
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, needs_int64


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of tile number `tile`: GROUP_M row blocks share each column block while it is in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def keep_from_bits(bits, rows, first_n, M, row_bytes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Booleans of one tile of C from bits (M, row_bytes), bit j of byte (row, c) being column 8c + j."""
    columns = first_n // 8 + tl.arange(0, BLOCK_N // 8)
    pointers = bits + rows[:, None].to(tl.int64) * row_bytes + columns[None, :]
    byte = tl.load(pointers, mask=(rows[:, None] < M) & (columns[None, :] < row_bytes), other=0).to(tl.int32)
    keep = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(keep != 0, (BLOCK_M, BLOCK_N))


@triton.jit
def start_tile(first_m, first_n, M, N, term, R, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE, LORA_HI_LO, USE_INT64, PRECISION):
    """bias + mask(alpha · U V) of the tile of C at (first_m, first_n), float32.  bias and bits are None where there is none."""
    bias, U, V, bits, stride_vr, stride_vn, stride_bias, row_bytes, alpha = term
    rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    offs_m = rows.to(tl.int64) if USE_INT64 else rows
    offs_n = cols.to(tl.int64) if USE_INT64 else cols
    acc = lora_tile(U, V, offs_m, offs_n, M, N, stride_vr, stride_vn, alpha, R, BLOCK_R, PRECISION, DTYPE, LORA_HI_LO)
    if bits is not None:
        acc = tl.where(keep_from_bits(bits, rows, first_n, M, row_bytes, BLOCK_M, BLOCK_N), acc, 0.0)
    if bias is not None:
        acc += tl.load(bias + offs_n * stride_bias, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def load_described(P, Q, first_m, first_n, k, Q_TRANSPOSED: tl.constexpr):
    """The blocks of P and Q at step k of the tile at (first_m, first_n)."""
    p = P.load([first_m, k])
    return p, tl.trans(Q.load([first_n, k])) if Q_TRANSPOSED else Q.load([k, first_n])


@triton.jit
def flattened(
    P, Q, C, M, N, K, term, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, DTYPE, LORA_HI_LO, ROUNDED, Q_TRANSPOSED, USE_INT64,
    PRECISION,
):  # fmt: skip
    """One loop over the steps of all tiles of a program, through descriptors.

    The first steps of the next tile are loaded while C is stored and the next rank-r product is made.  That product stands at
    the end of the loop, without a branch around it after the last tile: elsewhere Triton awaits every wgmma.
    """
    tiles, steps = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile, step = tl.program_id(0), -1
    first_m, first_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tile < tiles:  # always true: outside of a branch Triton keeps V's shared memory until the end
        acc = start_tile(first_m, first_n, M, N, term, R, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE, LORA_HI_LO, USE_INT64, PRECISION)
    tile -= tl.num_programs(0)
    for _ in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            first_m, first_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        p, q = load_described(P, Q, first_m, first_n, step * BLOCK_K, Q_TRANSPOSED)
        acc = dot(p, q, acc, PRECISION, ROUNDED, BY_TMA=True)
        if step == steps - 1:
            C.store([first_m, first_n], round_to(acc, DTYPE))
            following = tl.minimum(tile + tl.num_programs(0), tiles - 1)  # the last one again, for nothing
            next_m, next_n = grouped_tile(following, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = start_tile(next_m, next_n, M, N, term, R, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE, LORA_HI_LO, USE_INT64, PRECISION)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    P,
    Q,
    C,
    bias,
    U,
    V,
    bits,
    M,
    N,
    K,
    stride_pm,
    stride_pk,
    stride_qk,
    stride_qn,
    stride_vr,
    stride_vn,
    stride_bias,
    row_bytes,
    alpha,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    LORA_HI_LO: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROUNDED: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    USE_INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C = P Q + bias + mask(alpha · U V).  P, Q, C are descriptors (with Q_TRANSPOSED that of Qᵀ) or pointers."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    term = bias, U, V, bits, stride_vr, stride_vn, stride_bias, row_bytes, alpha
    if FLATTEN:
        flattened(
            P, Q, C, M, N, K, term, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, DTYPE, LORA_HI_LO, ROUNDED, Q_TRANSPOSED,
            USE_INT64, PRECISION,
        )  # fmt: skip
        return
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_m, first_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        offs_m = rows.to(tl.int64) if USE_INT64 else rows
        offs_n = cols.to(tl.int64) if USE_INT64 else cols
        acc = start_tile(first_m, first_n, M, N, term, R, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE, LORA_HI_LO, USE_INT64, PRECISION)
        if HAS_PRODUCT:
            # Rows and columns beyond C load row or column 0 and are not stored: cheaper than a mask in the main loop.
            safe_m, safe_n = tl.where(rows < M, offs_m, 0), tl.where(cols < N, offs_n, 0)
            for k in range(0, K, BLOCK_K):
                if DESCRIPTORS:
                    p, q = load_described(P, Q, first_m, first_n, k, Q_TRANSPOSED)
                else:
                    ks = k + tl.arange(0, BLOCK_K)
                    offs_k = ks.to(tl.int64) if USE_INT64 else ks
                    p_mask = None if EVEN_K else ks[None, :] < K
                    q_mask = None if EVEN_K else ks[:, None] < K
                    other = None if EVEN_K else 0.0
                    p = tl.load(P + safe_m[:, None] * stride_pm + offs_k[None, :] * stride_pk, mask=p_mask, other=other)
                    q = tl.load(Q + offs_k[:, None] * stride_qk + safe_n[None, :] * stride_qn, mask=q_mask, other=other)
                acc = dot(p, q, acc, PRECISION, ROUNDED, BY_TMA=DESCRIPTORS)
        if DESCRIPTORS:
            C.store([first_m, first_n], round_to(acc, DTYPE))
        else:
            c_mask = (rows[:, None] < M) & (cols[None, :] < N)
            tl.store(C + offs_m[:, None] * N + offs_n[None, :], round_to(acc, DTYPE), mask=c_mask)


def plan_gemm(
    P: TensorSpec | None,
    Q: TensorSpec | None,
    U: TensorSpec,
    V: TensorSpec,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    *,
    bias: TensorSpec | None = None,
    masked: bool = False,
    config: GemmConfig | None = None,
) -> Plan:
    """The launch for P (M, K), Q (K, N), V (r, N) and bias (N,) of any strides and a contiguous U (M, r).

    P, Q and C go through tensor descriptors where all three can, otherwise through pointers.  The shape chooses the tile when
    `config` is None or not valid for these operands: one that was measured with descriptors, say.
    """
    M, N, hi_lo = U.shape[0], V.shape[1], lora_hi_lo(V, dtype, target)
    C = TensorSpec.new(M, N, dtype=dtype)
    described: tuple[TensorSpec, ...] = ()  # what goes through descriptors, as it is stored
    transposed = False
    strides: tuple[int, ...]
    if P is None or Q is None:
        config, programs = lora_tile_config(dtype, precision), None
        K, strides = 0, (0, 0, 0, 0)
    else:
        K, strides, programs = P.shape[1], (*P.stride, *Q.stride), target.sms
        transposed = Q.stride[0] == 1 and Q.stride[1] != 1
        stored = P, Q.t() if transposed else Q, C
        described = stored if all(fits_descriptor(spec) and target.can_describe(spec.span) for spec in stored) else ()
        if config is None or not config.is_valid(target, dtype, precision, bool(described)):
            config = gemm_config(M, N, dtype, precision, target, bool(described))
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    rounded = precision == "tf32" and bool(described) and DESCRIPTORS_ROUND
    flatten = bool(described) and target.has_register_operands and dtype.itemsize == 2 and U.shape[1] <= 64
    options = {
        "R": U.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        # Split operands take twice the registers: 32 ranks a step spill 8 bytes at r = 128 (sm_90, Triton 3.6.0).
        "BLOCK_R": rank_block(U.shape[1], 16 if hi_lo or flatten else config.block_r),
        "GROUP_M": config.group_m,
        "DTYPE": TRITON_DTYPES[dtype],
        "HAS_PRODUCT": P is not None,
        "LORA_HI_LO": hi_lo,
        "DESCRIPTORS": bool(described),
        "ROUNDED": rounded,
        "Q_TRANSPOSED": transposed,
        "FLATTEN": flatten,
        "EVEN_K": K % config.block_k == 0,
        "USE_INT64": needs_int64(P, Q, C, U, V, bias),
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **target.register_limit,
    }
    small = (*V.stride, 0 if bias is None else bias.stride[0], packed_mask((M, N)).shape[1] if masked else 0)
    block_q = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    blocks = [config.block_m, config.block_k], [*block_q], [config.block_m, config.block_n]
    reading = ("zero", True) if rounded else ()  # padding and rounding
    return Plan(
        gemm_kernel,
        (min(tiles, programs or tiles),),
        (M, N, K, *strides, *small),
        options,
        (Result((M, N), dtype),),
        tuple(
            ([*m.shape], [*m.stride], block, *rest)
            for m, block, rest in zip(described, blocks, (reading, reading, ()), strict=False)
        ),
    )


#: Whether the loads of a descriptor can round float32 to TF32: from Triton 3.7 on, but not when it is interpreted.
DESCRIPTORS_ROUND = hasattr(TensorDescriptor, "round_f32_to_tf32") and not knobs.runtime.interpret


def gemm(
    plan: Plan,
    P: Tensor | None,
    Q: Tensor | None,
    U: Tensor,
    V: Tensor,
    *,
    alpha: float,
    bias: Tensor | None = None,
    bits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """P Q + bias + mask(alpha · U V), U in float32, in `out` (M, N), contiguous, where given; without P and Q the rest alone.

    The plan has the layouts of Q and V, so that Wᵀ and Bᵀ may be given as W and B.
    """
    C = plan.results[0].empty(U.device) if out is None else out
    launch.launch(plan, P, Q, C, bias, U, V, bits, *plan.sizes, alpha)
    return C
