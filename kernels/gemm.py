"""The two GEMMs, each with its rank-r term in one accumulator: y = x Wᵀ + bias + scaling · S Bᵀ and dx = dy W + mask(dS A).

Both are C (M, N) = P (M, K) Q (K, N) + bias + mask(alpha · U (M, R) V (R, N)); forward P = x, Q = Wᵀ, U = S, V = Bᵀ; backward
P = dy, Q = W, U = dS, V = A.  The rank-r product comes first, so that the main loop accumulates onto it and no second
accumulator is ever live; the mask is read from packed bits.  Persistent programs walk the tiles of C in groups of GROUP_M rows.

Without P and Q the same kernel writes bias + mask(alpha · U V) alone: the prefill, onto which another GEMM accumulates P Q.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import launch
from fastlora.kernels.config import GemmConfig, cdiv, gemm_config, prefill_config, rank_block
from fastlora.kernels.dot import TRITON_DTYPES, dot, matmul_precision, rank_term, round_to
from fastlora.kernels.target import Target, fits_descriptor, needs_int64


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
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C = P Q + bias + mask(alpha · U V); P, Q, C are descriptors (Q's of Qᵀ with Q_TRANSPOSED) or pointers."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_m, first_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        offs_m = rows.to(tl.int64) if WIDE else rows
        offs_n = cols.to(tl.int64) if WIDE else cols
        acc = rank_term(U, V, offs_m, offs_n, M, N, stride_vr, stride_vn, alpha, R, BLOCK_R, PRECISION, DTYPE)
        if HAS_MASK:
            acc = tl.where(keep_from_bits(bits, rows, first_n, M, row_bytes, BLOCK_M, BLOCK_N), acc, 0.0)
        if HAS_BIAS:
            acc += tl.load(bias + offs_n * stride_bias, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if HAS_PRODUCT:
            # Rows and columns beyond C read row or column 0 and are not stored: cheaper than a mask in the main loop.
            safe_m, safe_n = tl.where(rows < M, offs_m, 0), tl.where(cols < N, offs_n, 0)
            for k in range(0, K, BLOCK_K):
                if DESCRIPTORS:
                    p = P.load([first_m, k])
                    if Q_TRANSPOSED:
                        q = tl.trans(Q.load([first_n, k]))
                    else:
                        q = Q.load([k, first_n])
                else:
                    ks = k + tl.arange(0, BLOCK_K)
                    offs_k = ks.to(tl.int64) if WIDE else ks
                    p_mask = None if EVEN_K else ks[None, :] < K
                    q_mask = None if EVEN_K else ks[:, None] < K
                    other = None if EVEN_K else 0.0
                    p = tl.load(P + safe_m[:, None] * stride_pm + offs_k[None, :] * stride_pk, mask=p_mask, other=other)
                    q = tl.load(Q + offs_k[:, None] * stride_qk + safe_n[None, :] * stride_qn, mask=q_mask, other=other)
                acc = dot(p, q, acc, PRECISION)
        if DESCRIPTORS:
            C.store([first_m, first_n], round_to(acc, DTYPE))
        else:
            c_mask = (rows[:, None] < M) & (cols[None, :] < N)
            tl.store(C + offs_m[:, None] * N + offs_n[None, :], round_to(acc, DTYPE), mask=c_mask)


def _descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def gemm(
    P: Tensor,
    Q: Tensor,
    U: Tensor,
    V: Tensor,
    target: Target,
    *,
    alpha: float,
    bias: Tensor | None = None,
    bits: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """P Q + bias + mask(alpha · U V), (M, N) in P's dtype; P (M, K) and Q (K, N) of any strides, U (M, r) float32, V (r, N).

    P, Q and C go through tensor descriptors where all three can, otherwise through pointers.  `config` is chosen from the
    shape when it is not given, or not valid for these operands: a tile that was measured with descriptors, say.
    """
    (M, K), N = P.shape, Q.shape[1]
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    transposed = Q.stride(0) == 1 and Q.stride(1) != 1
    stored_q = Q.t() if transposed else Q
    descriptors = target.has_descriptors and all(fits_descriptor(matrix) for matrix in (P, stored_q, C))
    precision = matmul_precision(P.dtype)
    if config is None or not config.is_valid(target, P.dtype, precision, descriptors):
        config = gemm_config(M, N, P.dtype, precision, target, descriptors)
    operands: tuple[Any, ...] = (P, Q, C)
    if descriptors:
        block_q = [config.block_n, config.block_k] if transposed else [config.block_k, config.block_n]
        blocks = ([config.block_m, config.block_k], block_q, [config.block_m, config.block_n])
        operands = tuple(_descriptor(matrix, block) for matrix, block in zip((P, stored_q, C), blocks, strict=True))
    _launch(
        operands,
        (M, N, K, *P.stride(), *Q.stride()),
        (U, V, bias, bits),
        alpha,
        config,
        tiles_at_once=target.sms,
        DTYPE=TRITON_DTYPES[P.dtype],
        HAS_PRODUCT=True,
        DESCRIPTORS=descriptors,
        Q_TRANSPOSED=transposed,
        EVEN_K=K % config.block_k == 0,
        WIDE=needs_int64(P, Q, C, U, V, *(() if bias is None else (bias,))),
        PRECISION=precision,
    )
    return C


def prefill(
    U: Tensor,
    V: Tensor,
    dtype: torch.dtype,
    target: Target,
    *,
    alpha: float,
    bias: Tensor | None = None,
    bits: Tensor | None = None,
) -> Tensor:
    """bias + mask(alpha · U V), (M, N) in `dtype`, for a GEMM to accumulate onto; U (M, r) float32, V (r, N)."""
    M, N = U.shape[0], V.shape[1]
    C = torch.empty((M, N), dtype=dtype, device=U.device)
    _launch(
        (None, None, C),
        (M, N, 0, 0, 0, 0, 0),
        (U, V, bias, bits),
        alpha,
        prefill_config(dtype, matmul_precision(dtype), target),
        tiles_at_once=None,
        DTYPE=TRITON_DTYPES[dtype],
        HAS_PRODUCT=False,
        DESCRIPTORS=False,
        Q_TRANSPOSED=False,
        EVEN_K=True,
        WIDE=needs_int64(C, U, V, *(() if bias is None else (bias,))),
        PRECISION=matmul_precision(dtype),
    )
    return C


def _launch(
    operands: tuple[Any, ...],
    sizes: tuple[int, ...],
    small: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    alpha: float,
    config: GemmConfig,
    tiles_at_once: int | None,
    **flags: Any,
) -> None:
    """Launch over the tiles of C, at most `tiles_at_once` programs; operands = P, Q, C; sizes = M, N, K and strides of P, Q."""
    U, V, bias, bits = small
    tiles = cdiv(sizes[0], config.block_m) * cdiv(sizes[1], config.block_n)
    launch.launch(
        gemm_kernel,
        (min(tiles, tiles_at_once or tiles),),
        (
            *(*operands, bias, U, V, bits, *sizes, *V.stride()),
            *(0 if bias is None else bias.stride(0), 0 if bits is None else bits.shape[1], alpha),
        ),
        R=U.shape[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_block(U.shape[1], config.block_r),
        GROUP_M=config.group_m,
        HAS_BIAS=bias is not None,
        HAS_MASK=bits is not None,
        **flags,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
