"""LoRA linears: every provider at every size of the grid, each checked against float64 before it is timed."""

from collections.abc import Callable

import pytest

from benches.conftest import recorded_clock
from benches.grid import Size
from benches.suite import Suite


@pytest.mark.benchmark(timer=recorded_clock)
def test_linear(size: Size, pass_: str, provider: str, suite: Suite, record: Callable[..., None]) -> None:
    record(f"{size.id} {pass_}", *suite.linear(size, provider, pass_))
