"""What the tests of the tuner and of its file share: a GPU, a problem, its choices, and a look at what is launched."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora.dispatch import Problem
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.target import INTERPRETER, Target

NAMED = replace(INTERPRETER, name="Interpreted GPU")

GPU = Target(90, 132, 232448, "Test GPU 9000")
LARGE = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, True)  # its default is "fused"
TILE = GemmConfig(128, 256, 64, 32, 8, 3)  # takes descriptors, in bfloat16
TILED = f"fused/{TILE}"


def problems(count: int) -> list[Problem]:
    """LARGE, at so many widths."""
    return [replace(LARGE, in_features=64 * (index + 1)) for index in range(count)]


def watch(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Any], object]) -> None:
    """Hand every plan that is launched to `seen`."""
    from fastlora.kernels import launch

    right = launch.launch
    monkeypatch.setattr(launch, "launch", lambda plan, *args: (seen(plan), right(plan, *args)))
