"""shrink.py: S = drop(x) Aᵀ of one launch against float64.  test_dropout.py has the launch with dropout."""

import pytest
import torch
from planned import OPERANDS, assert_close, far_apart, run_shrink


@pytest.mark.parametrize("operands", OPERANDS)
def test_against_float64(operands):
    x, A, _ = operands.draw()
    assert_close(run_shrink(x, A, operands.target, scaling=0.5), 0.5 * x.double() @ A.double().t(), x.dtype)


def test_ranks_beyond_one_block():
    x, A = torch.randn(70, 40), torch.randn(130, 40)
    assert_close(run_shrink(x, A), x.double() @ A.double().t(), torch.float32)


def test_offsets_beyond_32_bits():
    """A wrapped offset would read another place, or none."""
    x, A = far_apart(3, 32, (1 << 30) + 8), far_apart(4, 32, (1 << 30) + 8)
    assert_close(run_shrink(x, A), x.double() @ A.double().t(), torch.float32)
