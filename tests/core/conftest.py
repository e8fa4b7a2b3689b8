"""Counters of the calls that layers make together and alone."""

from typing import Any

import pytest


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of projections of each call that a group makes."""
    from fastlora import lora_linears, sharing

    made: list[int] = []

    def counting(x: Any, projections: Any, **options: Any) -> Any:
        made.append(len(projections))
        return lora_linears(x, projections, **options)

    monkeypatch.setattr(sharing, "lora_linears", counting)
    return made


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each call that a layer makes alone."""
    from fastlora import lora_linear, modules

    made: list[int] = []

    def counting(*tensors: Any, **options: Any) -> Any:
        made.append(1)
        return lora_linear(*tensors, **options)

    monkeypatch.setattr(modules, "lora_linear", counting)
    return made
