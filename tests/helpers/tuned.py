"""What the tests of the tuner and of its file share: problems, a GPU, a timer, what is stored."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora import cli, dispatch, tune
from fastlora.benchmark.clock import Step
from fastlora.dispatch import Problem
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.target import INTERPRETER, Target

PROBLEM = Problem("forward", torch.float32, 16, 32, 48, 4, True)
PROBLEMS = [PROBLEM, replace(PROBLEM, direction="backward"), replace(PROBLEM, in_features=48, dropout=False)]
NAMED = replace(INTERPRETER, name="Interpreted GPU")

GPU = Target(90, 132, 232448, "Test GPU 9000")
LARGE = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, True)
TILE = GemmConfig(128, 256, 64, 32, 8, 3)  # takes descriptors, in bfloat16
TILED = f"fused/{TILE}"
assert dispatch.default_choice(LARGE, GPU) == "addmm"


def problems(count: int) -> list[Problem]:
    """LARGE, at so many widths."""
    return [replace(LARGE, in_features=64 * (index + 1)) for index in range(count)]


def run(problems: list[Problem], timer: tune.Timer, **options: Any) -> list[tune.Tuned]:
    """Tune on the interpreter; a remark is a failure."""
    return tune.tune(problems, "cpu", timer=timer, remark=pytest.fail, **options)


def favouring(winner: str, timed: list[str] | None = None) -> tune.Timer:
    """A timer for which `winner` takes half the time of all others; notes what it timed."""

    def timer(steps: Mapping[str, Step]) -> dict[str, list[float]]:
        for step in steps.values():
            step()
        if timed is not None:
            timed.extend(steps)
        return {choice: [0.5 if choice == winner else 1.0] * 5 for choice in steps}

    return timer


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says as it refuses, having touched nothing."""
    try:
        code: Any = cli.main(["tune", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    return err


def watch(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Any], object]) -> None:
    """Hand every plan that is launched to `seen`."""
    from fastlora.kernels import launch

    right = launch.launch

    def spy(plan: launch.Plan, *args: Any) -> None:
        seen(plan)
        right(plan, *args)

    monkeypatch.setattr(launch, "launch", spy)
