"""Attention's projections, the gated MLP, one decoder layer, and a whole model's training step."""

from collections.abc import Callable

import pytest

from benches.conftest import recorded_clock
from benches.suite import Suite


@pytest.mark.benchmark(timer=recorded_clock)
def test_decoder(kind: str, pass_: str, provider: str, suite: Suite, record: Callable[..., None]) -> None:
    record(" ".join(dict.fromkeys((kind, pass_))), *suite.model(kind, provider, pass_))
