"""grad_a.py: dA = Uᵀ drop(x), and dx's LoRA term beside it, of one launch against float64."""

import pytest
import torch
from planned import DTYPES, OPERANDS, assert_close, far_apart, run_grad_a

from fastlora import dropout_mask
from fastlora.dropout import keep_scale


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operands", OPERANDS)
def test_against_float64(operands, transposed):
    x, A, U = operands.draw()
    result, _ = run_grad_a(x, U, A.dtype, operands.target, transposed=transposed, scaling=0.5)
    assert_close(result.t() if transposed else result, 0.5 * U.double().t() @ x.double(), x.dtype)


@pytest.mark.parametrize("rank", [16, 130])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_dx_of_the_same_pass(dtype, adapter, dropout_p, rank):
    """With V the launch writes drop(U V) as well, for ranks in one block and in several."""
    x, U, V = torch.randn(40, 72).to(dtype), torch.randn(40, rank), torch.randn(72, rank).to(adapter).t()
    seed = torch.tensor([5]) if dropout_p else None
    keep = keep_scale(dropout_p) * dropout_mask(5, 40, 72, dropout_p)
    dA, dx = run_grad_a(x, U, adapter, V=V, seed=seed, dropout_p=dropout_p)
    assert_close(dA, U.double().t() @ (keep * x.double()), dtype)
    assert_close(dx, keep * (U.double() @ V.double()), dtype)


def test_offsets_beyond_32_bits():
    x, U = far_apart(3, 32, (1 << 30) + 8), torch.randn(3, 4)
    assert_close(run_grad_a(x, U, torch.float32)[0], U.double().t() @ x.double(), x.dtype)
