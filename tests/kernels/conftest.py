"""Every test of the kernels draws the same operands in every run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    torch.manual_seed(0)
