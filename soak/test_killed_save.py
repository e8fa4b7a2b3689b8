"""A process killed at any point of `save_adapter` leaves an adapter that loads as the old one or the new one, or not at all.

A point is before or after a call of one of the functions of `os` or the methods of files, without which no file changes.
Before a write a part of it is written.  A forked child dies at point 0, 1, 2, ... without any clean-up, until a child comes to
the end.  In the folder it finds no adapter, one that differs in its tensors only, or one that also differs in its config.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import from_pretrained, inject, load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("torch_backend")
#: What the old adapter has that the new one has not.
SCENARIOS: dict[str, dict[str, Any]] = {
    "tensors": {},
    "alpha": {"lora_alpha": 5},
    "rank": {"r": 3},
    "scaling rule": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"0": 4, "2": 2}},
    "targets": {"target_modules": ["0"]},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))


def adapter(seed: int, **options: Any) -> nn.Module:
    model = inject(network(), **{"target_modules": ["0", "2"], "r": 2, **options})
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.eval()


def touches_files(function: Any) -> bool:
    return function.__module__ in ("posix", "_io", "io") or isinstance(function.__self__, io.IOBase)


def killed_at(point: int, model: nn.Module, folder: Path) -> bool:
    """Fork a child that saves and dies at `point`; whether it died."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    passed = 0

    def count(frame: Any, event: str, function: Any) -> None:
        nonlocal passed
        if not event.startswith("c_") or not touches_files(function):
            return
        if passed == point:
            if event == "c_call" and function.__name__ == "write":
                os.write(function.__self__.fileno(), b"a part")
            os._exit(9)
        passed += 1

    sys.setprofile(count)
    try:
        save_adapter(model, folder)
    except BaseException:
        os._exit(1)
    os._exit(0)


def loaded(folder: Path, old: nn.Module, new: nn.Module, x: torch.Tensor) -> str:
    """Which adapter a plain model loads from the folder: "old", "new", "none" or "mixture"."""
    try:
        y = from_pretrained(network(), folder)(x)
    except (ValueError, FileNotFoundError):
        return "none"
    return next((name for name, model in (("old", old), ("new", new)) if torch.equal(model(x), y)), "mixture")


@pytest.mark.parametrize("before", [None, *SCENARIOS])
def test_killed_at_every_point(before: str | None, tmp_path: Path) -> None:
    new, old = adapter(2), adapter(1, **SCENARIOS[before or "tensors"])
    x = torch.randn(7, 5)
    assert not torch.equal(old(x), new(x))
    outcomes: dict[tuple[Any, ...], str] = {}  # contents of the folder -> what loads
    left = dict.fromkeys(("old", "new", "none", "mixture"), 0)
    for point in range(10_000):
        folder = tmp_path / str(point)
        if before:
            save_adapter(old, folder)
        died = killed_at(point, new, folder)
        state = tuple((path.name, path.read_bytes()) for path in sorted(folder.glob("adapter_*")))
        if state not in outcomes:
            outcomes[state] = loaded(folder, old, new, x)
        left[outcomes[state]] += 1
        if not died:
            break
    print(f"\nkilled at {point:,} points, {before or 'no adapter'} before: {left}", end="")
    assert outcomes[state] == "new"
    assert not left["mixture"]
    if before == "tensors":
        assert not left["none"]
    for state in outcomes:
        assert before is None or "adapter_model.safetensors" in dict(state)
    load_adapter(adapter(3), folder)
