"""What the tests of the tuner share: small problems, a GPU's name for the interpreter, a clock, the file."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from fastlora import choices, tune
from fastlora.benchmark.clock import Prepared
from fastlora.kernels.forms import Choice, Problem
from fastlora.kernels.target import INTERPRETER, Target

PROBLEM = Problem("forward", torch.float32, 16, 32, 48, 4, True)
PROBLEMS = [PROBLEM, replace(PROBLEM, direction="backward"), replace(PROBLEM, in_features=48, dropout=False)]
PREFILL, FUSED, TORCH = map(Choice, ("prefill", "fused", "torch"))
NAMED = replace(INTERPRETER, name="Interpreted GPU")


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
