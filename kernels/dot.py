"""Dots whose second operand may be wider than the first, and the LoRA tile of a GEMM."""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq

from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec


def version_of_triton() -> tuple[int, ...]:
    """(3, 6) of 3.6.0."""
    return tuple(map(int, triton.__version__.split(".")[:2]))


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
#: Triton before 3.7 leaves out the fence between the copies of a pipelined load (cp.async) and wgmma, its PR 9610.
FENCE_MISSING = tl.constexpr(not INTERPRETED.value and version_of_triton() < (3, 7))


@triton.jit
def truncate_to_tf32(t):
    """float32 t without the 13 low bits: what tensor cores read of it."""
    return (t.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def round_to_tf32(t):
    """float32 t to the nearest TF32 number, ties away from zero.

    The assembly is not pure, lest LLVM move it behind the fence that wgmma needs after the registers of an operand are written.
    On 10.x, which has no such fence, Triton cannot pipeline a loop around assembly that is not pure.
    """
    if INTERPRETED:
        rounded = truncate_to_tf32((t.to(tl.uint32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True))
        return tl.where(t == t, rounded, t)  # of a NaN the carry could make an infinity or −0
    pure: tl.constexpr = cuda_capability_geq(10, 0)
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [t], dtype=tl.float32, is_pure=pure, pack=1)


@triton.jit
def fence_copies():
    """On 9.x, lets wgmma see this thread's copies to shared memory.  The assembly is not pure, so it stays where it is."""
    if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
        fence: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, $1;"
        tl.inline_asm_elementwise(fence, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def accumulators(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tuple of zero tiles."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLS), tl.float32),)  # type: ignore[assignment]  # the tuple grows
    return tiles


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = False, BY_TMA: tl.constexpr = False):
    """acc + a b in float32.  In "tf32" the operands are rounded first, unless they are ROUNDED: tensor cores truncate.

    BY_TMA: both operands come through descriptors.

    The interpreter's dot neither truncates nor knows bfloat16, whose raw bits it multiplies.  There dot does both.
    """
    if PRECISION == "tf32" and not ROUNDED:
        a, b = round_to_tf32(a), round_to_tf32(b)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32":
            a, b = truncate_to_tf32(a), truncate_to_tf32(b)
    if FENCE_MISSING and not BY_TMA and not (a.dtype == tl.float32 and PRECISION == "ieee"):
        fence_copies()  # float32 in "ieee" runs without tensor cores
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def round_to(t, DTYPE: tl.constexpr):
    """t in DTYPE, to nearest even.  The interpreter truncates float32 to bfloat16, so there the bits are rounded first."""
    if INTERPRETED and DTYPE == tl.bfloat16 and t.dtype == tl.float32:
        bits = t.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000
        t = tl.where(t == t, bits.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)


@triton.jit
def into_range(t, OPERAND: tl.constexpr):
    """(t / s, 1 / s, s) for a tile t that is to be rounded to OPERAND.

    s = 1 but for float32 to float16, whose exponents do not cover a gradient's range: there s is the power of two that brings
    the largest finite |t| to 2**14 .. 2**15.  So rows far smaller than another keep their digits, and those beside an infinity.
    """
    if OPERAND == tl.float16 and t.dtype == tl.float32:
        size = tl.where(tl.abs(t) < float("inf"), tl.abs(t), 0.0)
        exponent = (tl.max(tl.max(size, axis=1), axis=0).to(tl.int32, bitcast=True) & 0x7F800000) - 0x07000000
        # Within 2**-40 .. 2**63 the product of two scales is a normal number, as is its inverse.
        exponent = tl.minimum(tl.maximum(exponent, 0x2B800000), 0x5F000000)
        inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        return t * inverse, inverse, exponent.to(tl.float32, bitcast=True)
    return t, 1.0, 1.0


@triton.jit
def dot_mixed(a, b, acc, PRECISION: tl.constexpr, HI_LO: tl.constexpr):
    """acc + a b, where b may be float32 beside a 16-bit a.

    With HI_LO, b = hi + lo, both in a's dtype.  a is exact, so two dots keep float32 quality.  Without, b is rounded to a's
    dtype.
    """
    if a.dtype == b.dtype:
        return dot(a, b, acc, PRECISION)
    b, inverse, scale = into_range(b.to(tl.float32), a.dtype)
    hi = round_to(b, a.dtype)
    acc = dot(a, hi, acc * inverse, PRECISION)
    if HI_LO:
        acc = dot(a, round_to(b - hi.to(tl.float32), a.dtype), acc, PRECISION)
    return acc * scale


@triton.jit
def lora_dot(u, v, acc, alpha, PRECISION: tl.constexpr, OPERAND: tl.constexpr, HI_LO: tl.constexpr):
    """acc + alpha · u v for a float32 u, with products of operands in OPERAND, the GEMM's dtype.

    A v in OPERAND is exact and u is rounded to it, as eager torch rounds S and dS.  With HI_LO u = u_hi + u_lo and
    v = v_hi + v_lo are float32, and three dots leave out u_lo v_lo alone.
    """
    u, inverse, scale = into_range(u * alpha, OPERAND)
    v, inverse_v, scale_v = into_range(v, OPERAND)
    u_hi, v_hi = round_to(u, OPERAND), round_to(v, OPERAND)
    acc = dot(u_hi, v_hi, acc * (inverse * inverse_v), PRECISION)
    if HI_LO:
        acc = dot(u_hi, round_to(v - v_hi.to(tl.float32), OPERAND), acc, PRECISION)
        acc = dot(round_to(u - u_hi.to(tl.float32), OPERAND), v_hi, acc, PRECISION)
    return acc * (scale * scale_v)


@triton.jit
def lora_tile(
    U,
    V,
    rows,
    cols,
    M,
    N,
    stride_vr,
    stride_vn,
    alpha,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    HI_LO: tl.constexpr,
):
    """alpha · U V of one tile of C, float32, by `lora_dot`: U (M, R) float32, V (R, N)."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = start + tl.arange(0, BLOCK_R)
        u_mask = (rows[:, None] < M) & (ranks[None, :] < R)
        u = tl.load(U + rows[:, None] * R + ranks[None, :], mask=u_mask, other=0.0)
        v_mask = (ranks[:, None] < R) & (cols[None, :] < N)
        v = tl.load(V + ranks[:, None].to(cols.dtype) * stride_vr + cols[None, :] * stride_vn, mask=v_mask, other=0.0)
        acc = lora_dot(u, v, acc, alpha, PRECISION, OPERAND, HI_LO)
    return acc


def lora_hi_lo(V: TensorSpec | None, dtype: torch.dtype, target: Target) -> bool:
    """Whether `lora_dot` splits its operands: V is float32 beside a 16-bit GEMM, where eager torch keeps V and S in float32.

    Not on 10.x: Triton gives each of the three dots an accumulator, 1024 of 512 columns of tensor memory (3.7.1, compiled).
    """
    return V is not None and V.dtype.itemsize > dtype.itemsize and not target.has_tensor_memory


def matmul_precision(dtype: torch.dtype) -> str:
    """How float32 dots multiply: "tf32" where torch's switch allows it, else "ieee".  16-bit operands are exact either way.

    AMD GPUs take "ieee": `round_to_tf32` is PTX.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
