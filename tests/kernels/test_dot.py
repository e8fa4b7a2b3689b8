"""dot.py: dots of operands in two dtypes, rounding, and the precision that torch's switch asks for."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from planned import AMPERE, run_gemm, run_grad_a, run_grad_s_and_b, run_shrink

from fastlora import oracle
from fastlora.kernels.dot import dot_mixed, matmul_precision, round_to, round_to_tf32
from fastlora.kernels.target import INTERPRETER


@triton.jit
def dot_kernel(a, b, out, HI_LO: tl.constexpr):
    index = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + index, dot_mixed(tl.load(a + index), tl.load(b + index), tl.zeros((32, 32), tl.float32), "ieee", HI_LO))


@triton.jit
def round_kernel(t, out):
    index = tl.arange(0, 4096)
    tl.store(out + index, round_to(tl.load(t + index), out.dtype.element_ty))


@triton.jit
def tf32_kernel(t, out):
    index = tl.arange(0, 1024)
    tl.store(out + index, round_to_tf32(tl.load(t + index)))


@pytest.mark.parametrize("exponent", [-30, 0, 60])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.float16, 5e-7), (torch.bfloat16, 5e-6)])
def test_dot_with_a_float32_operand(dtype, bound, exponent):
    """With HI_LO the product has float32 quality, whatever the exponent of b; without, b is rounded to a's dtype."""
    a, b, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32) * 2.0**exponent, torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, True)
    assert oracle.relative_error(out, a.double() @ b.double()) <= bound
    dot_kernel[(1,)](a, b, out, False)
    rounded = (b.double() * 2.0**-exponent).to(dtype).double() * 2.0**exponent
    assert oracle.relative_error(out, a.double() @ rounded) <= (1e-6 if dtype != torch.float16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_to_nearest_even(dtype):
    """As torch rounds: ties, infinities and NaN.  Not subnormals in bfloat16, which Triton's interpreter converts wrongly."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64)
    bits[:2048] = bits[:2048] >> 15 << 15  # ties in bfloat16
    bits[:1024:16], bits[1:1024:16], bits[2:1024:16] = 0x7F800000, 0x7FC00000, 0x3F801000
    t, out = bits.to(torch.int32).view(torch.float32), torch.empty(4096, dtype=dtype)
    t[t.abs() < 2.0**-126] = 0.0
    round_kernel[(1,)](t, out)
    assert torch.equal(out.isnan(), t.isnan())
    assert torch.equal(out.nan_to_num(0.0, torch.inf, -torch.inf), t.to(dtype).nan_to_num(0.0, torch.inf, -torch.inf))


def tf32(t):
    """t in float64, its significand rounded to 11 bits, ties away from zero."""
    fraction, exponent = np.frexp(t.double().numpy())
    return torch.from_numpy(np.ldexp(np.trunc(fraction * 2**11 + np.copysign(0.5, fraction)), exponent - 11))


def test_tf32_keeps_what_is_not_finite():
    """NaN with every payload, whose carry would give an infinity or −0.  The largest number becomes an infinity."""
    patterns = [0x7F800000, 0x7F7FFFFF, 0, 0x3F801000, 0x3F800FFF, *(0x7F800000 + (1 << bit) for bit in range(23)), 0x7FFFFFFF]
    bits = torch.tensor(patterns, dtype=torch.int64)
    t = torch.cat((bits, bits + 2**31)).to(torch.int32).view(torch.float32)
    out = torch.empty(1024)
    tf32_kernel[(1,)](torch.nn.functional.pad(t, (0, 1024 - t.numel())), out)
    expected = torch.tensor([math.inf, math.inf, 0.0, 1 + 2.0**-10, 1.0])
    for sign, half in ((1.0, out[: len(patterns)]), (-1.0, out[len(patterns) :])):
        assert torch.equal(half[:5], sign * expected)
        assert half[5 : len(patterns)].isnan().all()


@pytest.mark.parametrize("target", [INTERPRETER, AMPERE], ids=["descriptors", "pointers"])
def test_every_product_rounds_to_tf32(target, monkeypatch):
    """Tensor cores truncate float32, and so does `dot` when it is interpreted.  The kernels round every operand before."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    x, W, A, B = (torch.randn(*shape) for shape in ((40, 64), (48, 64), (4, 64), (48, 4)))
    U, dy = torch.randn(40, 4), torch.randn(40, 48)

    def assert_rounded(result, *factors):
        exact = sum(tf32(a) @ tf32(b) for a, b in zip(factors[::2], factors[1::2], strict=True))
        assert oracle.relative_error(result, exact) <= oracle.FLOOR[torch.float32, torch.float32]

    assert_rounded(run_shrink(x, A, target), x, A.t())
    dA, dx = run_grad_a(x, U, torch.float32, target, V=A)
    assert_rounded(dA, U.t(), x)
    assert_rounded(dx, U, A)
    dS, dB = run_grad_s_and_b(dy, B, U, torch.float32, target)
    assert_rounded(dS, dy, B)
    assert_rounded(dB, dy.t(), U)
    assert_rounded(run_gemm(x, W.t(), U, B.t(), target), x, W.t(), U, B.t())


@pytest.mark.parametrize("switch", ["ieee", "tf32"])
def test_precision_follows_the_switch(switch, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=switch))
    assert matmul_precision(torch.float32) == switch
    assert matmul_precision(torch.bfloat16) == matmul_precision(torch.float16) == "ieee"
