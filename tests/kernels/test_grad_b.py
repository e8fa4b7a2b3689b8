"""grad_b.py: dS and dB of one launch against float64."""

import pytest
import torch
from planned import OPERANDS, assert_close, far_apart, run_grad_s_and_b


@pytest.mark.parametrize("operands", OPERANDS)
def test_against_float64(operands):
    dy, A, S = operands.draw()
    dS, dB = run_grad_s_and_b(dy, A.t(), S, A.dtype, operands.target, scaling=0.5)
    assert_close(dS, 0.5 * dy.double() @ A.double().t(), dy.dtype)
    assert_close(dB, 0.5 * dy.double().t() @ S.double(), dy.dtype)


def test_offsets_beyond_32_bits():
    dy, B, S = far_apart(3, 24, (1 << 30) + 8), far_apart(24, 4, (1 << 27) + 8), torch.randn(3, 4)
    dS, dB = run_grad_s_and_b(dy, B, S, torch.float32)
    assert_close(dS, dy.double() @ B.double(), torch.float32)
    assert_close(dB, dy.double().t() @ S.double(), dy.dtype)
