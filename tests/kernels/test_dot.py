"""dot.py: dots of operands in two dtypes, rounding, and the precision that torch's switch asks for."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fastlora import oracle
from fastlora.kernels.dot import dot_mixed, matmul_precision, round_to


@triton.jit
def dot_kernel(a, b, out, HI_LO: tl.constexpr):
    index = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + index, dot_mixed(tl.load(a + index), tl.load(b + index), tl.zeros((32, 32), tl.float32), "ieee", HI_LO))


@triton.jit
def round_kernel(t, out):
    index = tl.arange(0, 4096)
    tl.store(out + index, round_to(tl.load(t + index), out.dtype.element_ty))


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


@pytest.mark.parametrize("switch", ["ieee", "tf32"])
def test_precision_follows_the_switch(switch, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=switch))
    assert matmul_precision(torch.float32) == switch
    assert matmul_precision(torch.bfloat16) == matmul_precision(torch.float16) == "ieee"
