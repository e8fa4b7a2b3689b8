"""Accelerated models under DDP and FSDP2: two processes on a CPU, their averaged gradients against those of the whole batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import bound_of

from fastlora import oracle

WORKER = Path(__file__).parents[1] / "helpers" / "data_parallel.py"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {outcome["way"]: outcome for outcome in lines}


@pytest.mark.parametrize(
    ("way", "dtype", "mlps"),
    [
        ("DDP", torch.float32, 0),
        ("DDP, MLPs as one step", torch.float32, 4),
        ("FSDP2", torch.float32, 0),
        ("FSDP2, MLPs as one step", torch.float32, 4),
        ("FSDP2 on a bfloat16 base", torch.bfloat16, 4),
    ],
)
def test_gradients_are_those_of_the_whole_batch(way: str, dtype: torch.dtype, mlps: int, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[way]
    assert outcome["taken"] == 14
    assert outcome["mlps"] == mlps
    assert outcome["fallbacks"] == {}
    assert outcome["saved"] == 28
    assert outcome["error"] <= bound_of(outcome["eager"], oracle.FLOOR[dtype, dtype])


def test_a_model_that_is_sharded_already_is_left_with_a_reason(outcomes: dict[str, Any]) -> None:
    assert "0 of 14 LoRA layers accelerated" in outcomes["FSDP2"]["late"]
    assert "its base weight is a DTensor" in outcomes["FSDP2"]["late"]
