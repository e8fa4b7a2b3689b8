"""What the tests of the tuner and of its file share: problems, a GPU and a name for the interpreter's, a clock, the file."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora import choices, cli, tune
from fastlora.benchmark.clock import Prepared
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.forms import Choice, Problem, default_choice
from fastlora.kernels.target import INTERPRETER, Target

PROBLEM = Problem("forward", torch.float32, 16, 32, 48, 4, True)
PROBLEMS = [PROBLEM, replace(PROBLEM, direction="backward"), replace(PROBLEM, in_features=48, dropout=False)]
ADDMM, FUSED, TORCH = map(Choice, ("addmm", "fused", "torch"))
NAMED = replace(INTERPRETER, name="Interpreted GPU")

GPU = Target(90, 132, 232448, "Test GPU 9000")
LARGE = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, True)
TILE = GemmConfig(128, 256, 64, 32, 8, 3)  # takes descriptors, in bfloat16
TILED = Choice("fused", TILE)
assert default_choice(LARGE, GPU).form == "addmm"


def problems(count: int) -> list[Problem]:
    """LARGE, at so many widths."""
    return [replace(LARGE, in_features=64 * (index + 1)) for index in range(count)]


def run(problems: list[Problem], clock: tune.Clock, **options: Any) -> list[tune.Result]:
    """Tune on the interpreter; a remark is a failure."""
    return tune.tune(problems, "cpu", clock=clock, remark=pytest.fail, **options)


def forget() -> None:
    """As another process begins."""
    choices._known.clear()
    choices._warned.clear()


def favouring(winner: Choice, timed: list[Choice] | None = None) -> tune.Clock:
    """A clock for which `winner` takes half the time of all others; notes what it timed."""

    def clock(steps: Mapping[Choice, Prepared]) -> dict[Choice, list[float]]:
        for step in steps.values():
            step()
        if timed is not None:
            timed.extend(steps)
        return {choice: [0.5 if choice == winner else 1.0] * 5 for choice in steps}

    return clock


def stored(target: Target = NAMED) -> dict[Problem, Choice]:
    """As another process finds it."""
    return {problem: choice for (problem, _), choice in choices._read(target).items()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says as it refuses, having touched nothing."""
    try:
        code: Any = cli.main(["tune", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    return err
