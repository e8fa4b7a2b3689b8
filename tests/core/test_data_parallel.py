"""Accelerated models under DDP and FSDP2: two processes on a CPU, their averaged gradients against those of the whole batch."""

import json
import subprocess
import sys
from typing import Any

import data_parallel
import pytest
from peft_models import bound_of

from fastlora import oracle


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run([sys.executable, data_parallel.__file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {outcome["way"]: outcome for outcome in lines}


@pytest.mark.parametrize("way", data_parallel.WAYS)
def test_gradients_are_those_of_the_whole_batch(way: str, outcomes: dict[str, Any]) -> None:
    _, dtype, mlp = data_parallel.WAYS[way]
    outcome = outcomes[way]
    assert outcome["taken"] == 14
    assert outcome["mlps"] == 2 * data_parallel.STEPS * mlp
    assert outcome["fallbacks"] == {}
    assert outcome["saved"] == 28
    assert outcome["error"] <= bound_of(outcome["eager"], oracle.FLOOR[dtype, dtype])


def test_a_model_that_is_sharded_already_is_left_with_a_reason(outcomes: dict[str, Any]) -> None:
    assert "0 of 14 LoRA layers accelerated" in outcomes["FSDP2"]["late"]
    assert "its base weight is a DTensor" in outcomes["FSDP2"]["late"]
