"""LoRA linears: every provider at every size of the grid, each checked against float64 before it is timed."""

from collections.abc import Callable

import pytest
from conftest import recorded_clock
from grid import Size
from suite import Suite


@pytest.mark.benchmark(timer=recorded_clock)
def test_linear(size: Size, pass_: str, provider: str, suite: Suite, record: Callable[..., None]) -> None:
    measurement, rows = suite.linear(size, provider)
    row = next(row for row in rows if row["pass"] == pass_)
    record(f"{size.id} {pass_}", measurement.seconds[pass_], row)
