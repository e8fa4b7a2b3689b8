"""The tuner: who competes, what decides, what is stored, and where it must not run.

The interpreter's GPU is given a name, and the timer is the test's own, which runs every step that it is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources
from tuned import NAMED, PROBLEM, PROBLEMS, favouring, run, watch

from fastlora import dispatch, functional, tune
from fastlora.benchmark.clock import Prepared, Quantiles, Step
from fastlora.dispatch import Problem, candidates, default_choice, store, stored
from fastlora.kernels import launch
from fastlora.kernels.config import valid_tiles
from fastlora.kernels.gemm import gemm_kernel
from fastlora.kernels.target import Target

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_form_and_tile_competes(capability: int, dtype: torch.dtype) -> None:
    gpu = Target(capability, 100, 166912 if capability == 80 else 232448, "GPU")
    for direction, dropout, width in product(("forward", "backward"), (False, True), (4096, 4095)):
        problem = Problem(direction, dtype, 8192, width, 2048, 16, dropout)
        first, *others = candidates(problem, gpu)
        assert first == default_choice(problem, gpu)
        descriptors = capability >= 90 and (width % 8 == 0 or (dtype == torch.float32 and width % 4 == 0))
        tiles = {f"fused/{tile}" for tile in valid_tiles(dtype, "ieee", gpu, descriptors)}
        assert {first, *others} == {"fused", "addmm", *tiles} | (set() if dropout else {"torch"})


def test_the_problems_of_a_model() -> None:
    found = tune.problems_for([(64, 32), (32, 64)], [100, 128, 512], [8, 16], [False, True], torch.float16)
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert {problem.rows for problem in found} == {128, 512}
    assert {(problem.in_features, problem.out_features) for problem in found} == {(64, 32), (32, 64)}


def times(median: float, spread: float = 0.1) -> Quantiles:
    return Quantiles(median - spread, median, median + spread)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"addmm": times(1.0), "fused": times(0.7), "torch": times(0.75)}, "fused"),
        ({"addmm": times(1.0), "fused": times(0.81), "torch": times(1.5)}, "addmm"),
        ({"addmm": times(1.0), "fused": times(1.3)}, "addmm"),
        ({"addmm": times(1.0)}, "addmm"),
        ({"addmm": times(1.0), "fused": times(0.6, 0.31), "torch": times(0.7)}, "torch"),
        ({"addmm": times(1.0, 0.0), "fused": times(0.999, 0.0)}, "fused"),
        ({"addmm": times(1.0, 0.0), "fused": times(1.0, 0.0)}, "addmm"),
        ({"fused": times(3.0), "torch": times(2.95)}, "torch"),
    ],
    ids=["faster", "within the spread", "slower", "alone", "unsteady", "steady", "equal", "no default"],
)
def test_the_rule(seconds: dict[str, Quantiles], chosen: str) -> None:
    assert tune.decide(seconds, "addmm") == chosen


def test_the_speedup_and_its_spread() -> None:
    seconds = {"addmm": Quantiles(9, 10, 12), "fused": Quantiles(4, 5, 6)}
    assert tune.Tuned(PROBLEM, "addmm", "fused", seconds).speedup == (9 / 6, 10 / 5, 12 / 4)
    assert tune.Tuned(PROBLEM, "addmm", "fused", {"fused": Quantiles(4, 5, 6)}).speedup is None
    assert tune.Tuned(PROBLEM, "addmm", skipped="out of memory").speedup is None


def test_the_winner_of_every_problem_is_stored(target: Target) -> None:
    for winner in ("fused", candidates(PROBLEM, target)[-1], "addmm"):
        outcomes = run(PROBLEMS, favouring(winner), again=True)
        assert [tuned.choice for tuned in outcomes] == [winner] * 3
        assert stored(target) == dict.fromkeys(map(str, PROBLEMS), winner)
        assert all(dispatch.choose(problem, target) == winner for problem in PROBLEMS)
    assert outcomes[0].seconds.keys() == set(candidates(PROBLEM, target))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_step_runs_its_own_choice(problem: Problem, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed half runs at the problem's size, with its mask, whatever was stored before, and plans nothing anew."""
    store(target, {problem: "fused"})
    plans: list[launch.Plan] = []
    watch(monkeypatch, plans.append)

    def timer(steps: Mapping[str, Step]) -> dict[str, list[float]]:
        for choice, step in steps.items():
            prepared = step if isinstance(step, Prepared) else Prepared(lambda: None, lambda _, step=step: step())
            state = prepared.setup()
            plans.clear()
            misses = dispatch.plan_forward.cache_info().misses + dispatch.plan_backward.cache_info().misses
            prepared.run(state)
            assert dispatch.plan_forward.cache_info().misses + dispatch.plan_backward.cache_info().misses == misses
            gemms = [plan.options for plan in plans if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"]]
            assert len(gemms) == choice.startswith("fused")
            assert bool(plans) == (choice != "torch")
            if "/" in choice:
                assert choice.startswith(f"fused/{gemms[0]['BLOCK_M']},{gemms[0]['BLOCK_N']},{gemms[0]['BLOCK_K']},")
        return {choice: [1.0] for choice in steps}

    (tuned,) = run([problem], timer, again=True)
    assert tuned.seconds.keys() == set(candidates(problem, target))
    assert dispatch.choose(problem, target) == tuned.choice == default_choice(problem, target)


def test_the_real_clock(target: Target) -> None:
    (tuned,) = tune.tune([PROBLEMS[2]], "cpu", repeats=2, adapter_dtype=torch.float32)
    assert all(0 < times.p20 <= times.median <= times.p80 < 60 for times in tuned.seconds.values())
    assert stored(target) == {str(PROBLEMS[2]): tuned.choice}


def test_what_is_stored_is_kept_unless_asked_for_again(target: Target) -> None:
    first, second, third = PROBLEMS
    store(target, {second: "fused"})
    store(replace(target, name="Another GPU"), {first: "fused"})
    store(target, {replace(first, precision="tf32"): "fused"})
    timed: list[str] = []
    finished: list[tune.Tuned] = []
    outcomes = run(PROBLEMS, favouring("addmm", timed), finished=finished.append)
    assert outcomes == finished
    assert [(tuned.problem, tuned.kept) for tuned in outcomes] == [(first, False), (second, True), (third, False)]
    assert outcomes[1] == tune.Tuned(second, "addmm", "fused", kept=True)
    assert len(timed) == sum(len(candidates(problem, target)) for problem in (first, third))
    assert all(tuned.kept for tuned in run(PROBLEMS, lambda steps: pytest.fail("measured")))
    (anew,) = run([second], favouring("addmm"), again=True)
    assert (anew.choice, anew.kept) == ("addmm", False)
    assert stored(target)[str(second)] == "addmm"


# Wrong results and trouble on the way


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], bool]], None]:
    """spoilt(which): the launches of the GEMM kernel with such options write NaN, as an unfinished kernel would."""
    right = launch.launch

    def spoil(which: Callable[[dict[str, Any]], bool]) -> None:
        def wrong(plan: launch.Plan, *args: Any) -> None:
            right(plan, *args)
            if plan.kernel is gemm_kernel and which(plan.options):
                C = args[2]
                (C if isinstance(C, torch.Tensor) else C.base).fill_(torch.nan)

        monkeypatch.setattr(launch, "launch", wrong)

    return spoil


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_candidate_is_left_out(direction: str, target: Target, spoilt: Any) -> None:
    problem = replace(PROBLEM, direction=direction)
    spoilt(lambda options: options["HAS_PRODUCT"])
    timed: list[str] = []
    with pytest.warns(
        UserWarning, match=f"{direction} float32 16 x 32 -> 48 r=4 with dropout: fused.* is left out: its result is"
    ):
        (tuned,) = tune.tune([problem], "cpu", timer=favouring("fused", timed))
    assert timed == ["addmm"]
    assert stored(target) == {str(problem): "addmm"}
    assert tuned.wrong
    assert len(tuned.left_out) == 4
    assert "OVER" in tuned.left_out["fused"]


def test_a_wrong_default_gives_way_and_no_candidate_stores_nothing(target: Target, spoilt: Any) -> None:
    spoilt(lambda options: not options["HAS_PRODUCT"])
    remarks: list[str] = []
    (tuned,) = tune.tune([PROBLEM], "cpu", timer=favouring("fused"), remark=remarks.append, again=True)
    assert (tuned.default, tuned.choice, tuned.speedup, len(remarks)) == ("addmm", "fused", None, 1)
    spoilt(lambda options: True)
    outcomes = tune.tune([PROBLEMS[1], PROBLEMS[2]], "cpu", timer=favouring("fused"), remark=remarks.append)
    assert [tuned.choice for tuned in outcomes] == [None, "torch"]
    assert outcomes[0].skipped == "no candidate is left"
    assert "backward float32 16 x 32 -> 48 r=4 with dropout is skipped: no candidate is left" in remarks
    assert stored(target) == {str(PROBLEM): "fused", str(PROBLEMS[2]): "torch"}


@pytest.mark.parametrize("error", [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")])
def test_a_candidate_that_does_not_compile_is_left_out(error: Exception, target: Target, monkeypatch: Any) -> None:
    tile = candidates(PROBLEM, target)[-1]

    def fail(plan: launch.Plan) -> None:
        if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"] and plan.options["BLOCK_M"] == 32:
            raise error

    watch(monkeypatch, fail)
    remarks: list[str] = []
    (tuned,) = tune.tune([PROBLEM], "cpu", timer=favouring("addmm"), remark=remarks.append)
    assert tile in tuned.left_out
    assert (tuned.choice, tuned.wrong) == ("addmm", False)
    assert f"{type(error).__name__}: " in remarks[0]


def test_a_lost_device_is_no_candidates_fault(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(plan: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    watch(monkeypatch, lost)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run([PROBLEM], favouring("fused"))
    assert stored(target) == {}


def failing_at(number: int, error: BaseException | type[BaseException]) -> tune.Timer:
    calls = []

    def timer(steps: Mapping[str, Step]) -> dict[str, list[float]]:
        calls.append(steps)
        if len(calls) == number:
            raise error
        return dict(favouring("fused")(steps))

    return timer


@pytest.mark.parametrize("where", ["the timing", "the inputs", "the check"])
def test_a_problem_that_runs_out_of_memory_is_skipped(where: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    right, judge, remarks = tune.draw, tune.Judge, list[str]()

    def full(case: Any, *args: Any) -> Any:
        if case.shape == (16, 48, 48):
            raise error
        return right(case, *args)

    timer = failing_at(3, error) if where == "the timing" else favouring("fused")
    if where == "the inputs":
        monkeypatch.setattr(tune, "draw", full)
    if where == "the check":
        monkeypatch.setattr(tune, "Judge", lambda case, first: full(case) if case.shape == (16, 48, 48) else judge(case, first))
    outcomes = tune.tune(PROBLEMS, "cpu", timer=timer, remark=remarks.append)
    assert [tuned.choice for tuned in outcomes] == ["fused", "fused", None]
    assert remarks[-1].endswith("is skipped: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert stored(target) == dict.fromkeys(map(str, PROBLEMS[:2]), "fused")


def test_an_interrupted_tune_keeps_what_it_has(target: Target) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(PROBLEMS, failing_at(2, KeyboardInterrupt))
    assert stored(target) == {str(PROBLEMS[0]): "fused"}
    assert [tuned.kept for tuned in run(PROBLEMS, favouring("fused"))] == [True, False, False]
    assert stored(target) == dict.fromkeys(map(str, PROBLEMS), "fused")


# Where it must not run


def untouched(steps: Any) -> Any:
    pytest.fail("measured")


@pytest.mark.parametrize("place", ["a CPU", "an old GPU", "a capture", "torch.compile", "no rate", "no folder"])
def test_where_it_must_not_run(place: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """It measures and writes nothing."""
    device, options, expected = "cpu", {}, (RuntimeError, r"capability 8\.0 or newer; the device is c")
    if place == "an old GPU":
        device = "cuda:0"
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    elif place == "a capture":
        device, expected = "cuda", (RuntimeError, "a CUDA graph cannot capture")
        monkeypatch.setattr(tune, "available_backends", lambda device: functional.BACKENDS)
        monkeypatch.setattr(tune, "target_of", lambda device: NAMED)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif place == "torch.compile":
        expected = AssertionError, "forbidden callable <function tune"
    elif place == "no rate":
        options, expected = {"dropout_p": 0.0}, (ValueError, r"dropout_p must be at least 1/65536, .* got 0")
    elif place == "no folder":
        request.getfixturevalue("target")
        empty_cache.write_text("")
        expected = OSError, "cache"

    def call(x: torch.Tensor) -> torch.Tensor:
        tune.tune([PROBLEM], device, timer=untouched, **options)
        return x + 1

    error, message = expected
    with pytest.raises(error, match=message):
        (torch.compile(call, backend="eager") if place == "torch.compile" else call)(torch.ones(2))
    assert empty_cache.is_file() or not empty_cache.exists()
