"""Trouble costs the tuner one problem at most, and where it must not run it measures and writes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import FUSED, NAMED, PROBLEM, PROBLEMS, favouring, run, stored

from fastlora import choices, functional, tune
from fastlora.benchmark.clock import Prepared
from fastlora.kernels import launch
from fastlora.kernels.forms import Choice, default_choice
from fastlora.kernels.target import Target

pytestmark = pytest.mark.usefixtures("empty_cache")


# Trouble on the way


def failing_at(number: int, error: BaseException | type[BaseException]) -> tune.Clock:
    calls = []

    def clock(steps: Mapping[Choice, Prepared]) -> dict[Choice, list[float]]:
        calls.append(steps)
        if len(calls) == number:
            raise error
        return favouring(FUSED)(steps)

    return clock


def test_a_problem_that_runs_out_of_memory_is_skipped(target: Target) -> None:
    remarks: list[str] = []
    clock = failing_at(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."))
    results = tune.tune(PROBLEMS, "cpu", clock=clock, remark=remarks.append)
    assert [result.choice for result in results] == [FUSED, None, FUSED]
    reason = "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert results[1].skipped == reason
    assert remarks == [f"backward f32 16 x 32 -> 48 r=4 with dropout is skipped: {reason}"]
    assert stored() == {PROBLEMS[0]: FUSED, PROBLEMS[2]: FUSED}


def test_out_of_memory_at_the_inputs_or_the_check(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for module, name in ((tune, "draw"), (launch, "launch")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            (result,) = tune.tune([PROBLEM], "cpu", clock=favouring(FUSED), remark=lambda what: None)
        assert result.skipped == "out of memory: CUDA out of memory."
    assert stored() == {}


def test_an_interrupted_tune_keeps_what_it_has(target: Target) -> None:
    finished: list[tune.Result] = []
    with pytest.raises(KeyboardInterrupt):
        run(PROBLEMS, failing_at(2, KeyboardInterrupt), finished=finished.append)
    assert [result.problem for result in finished] == PROBLEMS[:1]
    assert stored() == {PROBLEMS[0]: FUSED}
    assert choices.choose(PROBLEMS[1], target) == default_choice(PROBLEMS[1], target)
    begun = run(PROBLEMS, favouring(FUSED))
    assert [result.kept for result in begun] == [True, False, False]
    assert stored() == dict.fromkeys(PROBLEMS, FUSED)


# Where it must not run


def untouched(steps: Any) -> Any:
    pytest.fail("measured")


def test_not_without_a_gpu(empty_cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"capability 8\.0 or newer; the device is cpu$"):
        tune.tune([PROBLEM], "cpu", clock=untouched)
    assert not empty_cache.exists()


def test_not_below_capability_80(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"capability 8\.0 or newer; the device is cuda:0$"):
        tune.tune([PROBLEM], "cuda:0", clock=untouched)
    assert not empty_cache.exists()


def test_not_while_a_graph_is_captured(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "available_backends", lambda device: functional.BACKENDS)
    monkeypatch.setattr(tune, "target_of", lambda device: NAMED)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"):
        tune.tune([PROBLEM], "cuda", clock=untouched)
    assert not empty_cache.exists()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_not_under_compile(fullgraph: bool, empty_cache: Path, target: Target) -> None:
    @torch.compile(backend="eager", fullgraph=fullgraph)
    def step(x: torch.Tensor) -> torch.Tensor:
        tune.tune([PROBLEM], "cpu", clock=untouched)
        return x + 1

    with pytest.raises(AssertionError, match="forbidden callable <function tune"):
        step(torch.ones(2))
    assert not empty_cache.exists()


def test_not_while_another_tracer_is_at_work(empty_cache: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be traced"):
        tune.tune([PROBLEM], "cpu", clock=untouched)
    assert not empty_cache.exists()


@pytest.mark.parametrize("named", [False, True], ids=["no GPU", "GPU"])
def test_not_with_a_rate_that_never_drops(named: bool, empty_cache: Path, request: pytest.FixtureRequest) -> None:
    if named:
        request.getfixturevalue("target")
    with pytest.raises(ValueError, match=r"dropout_p must be at least 1/65536, .* got 0"):
        tune.tune([PROBLEM], "cpu", clock=untouched, dropout_p=0.0)
    assert not empty_cache.exists()


def test_not_where_nothing_can_be_kept(target: Target, empty_cache: Path) -> None:
    empty_cache.write_text("")
    with pytest.raises(OSError, match="cache"):
        tune.tune([PROBLEM], "cpu", clock=untouched)
