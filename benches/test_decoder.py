"""One decoder layer, and a whole model's training step: PEFT against fastlora."""

from collections.abc import Callable

import pytest

from benches.conftest import recorded_clock
from benches.decoder import LAYER, TRAINING_STEP
from benches.suite import Suite
from fastlora.benchmark import PASSES


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize("provider", ["frozen layer", "PEFT", "fastlora"])
@pytest.mark.parametrize("pass_", PASSES)
def test_decoder_layer(pass_: str, provider: str, suite: Suite, record: Callable[..., None]) -> None:
    record(f"{LAYER} {pass_}", *suite.model(LAYER, provider, pass_))


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize("provider", ["PEFT", "fastlora"])
def test_training_step(provider: str, suite: Suite, record: Callable[..., None]) -> None:
    record(TRAINING_STEP, *suite.model(TRAINING_STEP, provider, TRAINING_STEP))
