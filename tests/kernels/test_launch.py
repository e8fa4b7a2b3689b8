"""launch.py: results and plans.  tests/compile/test_launch.py has the launches of compiled kernels."""

import pytest
import torch

from fastlora.kernels import launch
from fastlora.kernels.launch import Plan, Result


def test_memory_of_a_result():
    """A whole result in its dtype; parts in float32."""
    device = torch.device("meta")
    whole, split = Result((3, 4), torch.bfloat16).empty(device), Result((3, 4), torch.bfloat16, 5).empty(device)
    assert (whole.shape, whole.dtype) == ((3, 4), torch.bfloat16)
    assert (split.shape, split.dtype) == ((5, 3, 4), torch.float32)


@pytest.mark.parametrize(("grid", "launches"), [((2, 3), 1), ((0, 3), 0), ((2, 0), 0)])
def test_an_empty_grid_launches_nothing(grid, launches):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    launch.launch(Plan(Kernel(), grid, (), {"num_warps": 4}), 1, 2)
    assert calls == [(grid, (1, 2), {"num_warps": 4, "enable_fp_fusion": True})] * launches
