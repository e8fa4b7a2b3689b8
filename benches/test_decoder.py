"""One decoder layer, and a whole model's training step: PEFT against fastlora."""

from collections.abc import Callable

import pytest
from conftest import recorded_clock
from decoder import TRAINING_STEP
from suite import Suite

from fastlora.benchmark import PASSES


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize("provider", ["frozen layer", "PEFT", "fastlora"])
@pytest.mark.parametrize("pass_", PASSES)
def test_decoder_layer(pass_: str, provider: str, suite: Suite, toy: bool, record: Callable[..., None]) -> None:
    seconds, row = suite.layer(provider, pass_, toy=toy)
    record(f"decoder layer {pass_}", seconds, row)


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize("provider", ["PEFT", "fastlora"])
def test_training_step(provider: str, suite: Suite, toy: bool, record: Callable[..., None]) -> None:
    seconds, row = suite.training(provider, toy=toy)
    record(TRAINING_STEP, seconds, row)
