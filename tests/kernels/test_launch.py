"""launch.py: what reaches a kernel.  tests/compile/test_launch.py has the launches of compiled kernels."""

import pytest

from fastlora.kernels import launch
from fastlora.kernels.launch import Plan


@pytest.mark.parametrize(("grid", "launches"), [((2, 3), 1), ((0, 3), 0), ((2, 0), 0)])
def test_an_empty_grid_launches_nothing(grid, launches):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    launch.launch(Plan(Kernel(), grid, (), {"num_warps": 4}), 1, 2)
    assert calls == [(grid, (1, 2), {"num_warps": 4, "enable_fp_fusion": True})] * launches
