"""The tuner: who competes, what decides, that what is measured is what users get, that only right results are timed and stored.

The interpreter's GPU is given a name, and the clock is the test's own, which runs every step it is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources
from tuned import ADDMM, FUSED, LARGE, PROBLEM, PROBLEMS, TORCH, favouring, forget, run, stored

from fastlora import choices, tune
from fastlora.benchmark.clock import Prepared, Quantiles
from fastlora.kernels import launch
from fastlora.kernels.config import gemm_config
from fastlora.kernels.forms import Choice, Problem, default_choice
from fastlora.kernels.gemm import gemm_kernel
from fastlora.kernels.plans import plan_backward, plan_forward
from fastlora.kernels.target import Target

pytestmark = pytest.mark.usefixtures("empty_cache")


# Who competes


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_form_and_tile_competes_once(capability: int, dtype: torch.dtype) -> None:
    gpu = Target(capability, 100, 166912 if capability == 80 else 232448, "GPU")
    for direction, dropout, width in product(tune.DIRECTIONS, (False, True), (4096, 4095)):
        problem = Problem(direction, dtype, 8192, width, 2048, 16, dropout)
        first, *others = tune.candidates(problem, gpu)
        assert first == default_choice(problem, gpu)
        everyone = [first, *others]
        assert len(set(everyone)) == len(everyone)
        assert {choice.form for choice in everyone} == set(problem.forms)
        tiles = [choice.config for choice in everyone if choice.config]
        descriptors = capability >= 90 and (width % 8 == 0 or (dtype == torch.float32 and width % 4 == 0))
        cols = 2048 if direction == "forward" else width
        automatic = gemm_config(8192, cols, dtype, "ieee", gpu, descriptors)
        assert {*tiles, automatic} == set(choices.tiles(problem, gpu))
        assert automatic not in tiles
        assert all(tile.is_valid(gpu, dtype, "ieee", descriptors) for tile in tiles)


def test_every_candidate_has_a_name_of_its_own() -> None:
    """Also on a GPU with room for all of them, where the tile that goes unnamed is a small one."""
    everyone = tune.candidates(replace(LARGE, rows=512), Target(90, 132, 1 << 20, "GPU"))
    assert len({tune.name_of(choice) for choice in everyone}) == len(everyone)
    assert {choice.config.store_parts for choice in everyone if choice.config} == {1, 4}


def test_the_problems_of_a_model() -> None:
    found = tune.problems_for([(64, 32), (32, 64)], [100, 128, 512], [8, 16], [False, True], torch.float16)
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert {problem.rows for problem in found} == {128, 512}
    assert {(problem.in_features, problem.out_features) for problem in found} == {(64, 32), (32, 64)}


# What decides


def times(median: float, spread: float = 0.1) -> Quantiles:
    return Quantiles(median - spread, median, median + spread)


A, B = FUSED, TORCH


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({ADDMM: times(1.0), A: times(0.7), B: times(0.75)}, A),
        ({ADDMM: times(1.0), A: times(0.81), B: times(1.5)}, ADDMM),
        ({ADDMM: times(1.0), A: times(1.3)}, ADDMM),
        ({ADDMM: times(1.0)}, ADDMM),
        ({ADDMM: times(1.0), A: times(0.6, 0.31), B: times(0.7)}, B),
        ({ADDMM: times(1.0, 0.0), A: times(0.999, 0.0)}, A),
        ({ADDMM: times(1.0, 0.0), A: times(1.0, 0.0)}, ADDMM),
        ({A: times(3.0), B: times(2.95)}, B),
    ],
    ids=["faster", "within the spread", "slower", "alone", "unsteady", "steady", "equal", "no default"],
)
def test_the_rule(seconds: dict[Choice, Quantiles], chosen: Choice) -> None:
    assert tune.decide(seconds, ADDMM) == chosen


def test_the_speedup_and_its_spread() -> None:
    result = tune.Result(PROBLEM, ADDMM, FUSED, {ADDMM: Quantiles(9, 10, 12), FUSED: Quantiles(4, 5, 6)})
    assert result.speedup == (9 / 6, 10 / 5, 12 / 4)
    assert tune.Result(PROBLEM, ADDMM, FUSED, {FUSED: Quantiles(4, 5, 6)}).speedup is None
    assert tune.Result(PROBLEM, ADDMM, skipped="out of memory").speedup is None


# What is measured is what users get


def test_the_winner_of_every_problem_is_stored(target: Target) -> None:
    for winner in (FUSED, tune.candidates(PROBLEM, target)[-1], ADDMM):
        results = run(PROBLEMS, favouring(winner), again=True)
        assert [result.choice for result in results] == [winner] * 3
        assert stored() == dict.fromkeys(PROBLEMS, winner)
        assert all(choices.choose(problem, target) == winner for problem in PROBLEMS)
    assert winner.config is None
    assert results[0].seconds.keys() == set(tune.candidates(PROBLEM, target))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_step_runs_its_own_choice(problem: Problem, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the timed half of the step, and at the size and with the mask of the problem; whatever was stored before."""
    choices.store(target, {problem: FUSED})
    seen, taken = [], []
    launch_, choose = launch.launch, choices.choose
    monkeypatch.setattr(launch, "launch", lambda plan, *args: seen.append(plan) or launch_(plan, *args))
    monkeypatch.setattr(choices, "choose", lambda *args: taken.append((*args, choose(*args))) or choose(*args))

    def clock(steps: Mapping[Choice, Prepared]) -> dict[Choice, list[float]]:
        for choice, step in steps.items():
            prepared = step.setup()
            seen.clear()
            taken.clear()
            plan_forward.cache_clear()  # a plan that is kept does not ask again
            plan_backward.cache_clear()
            step.run(prepared)
            assert taken == [(problem, target, choice)]
            assert bool(seen) == (choice.form != "torch")
        return {choice: [1.0] for choice in steps}

    (result,) = run([problem], clock, again=True)
    assert len(result.seconds) == len(problem.forms) + 2
    assert choose(problem, target) == result.choice == default_choice(problem, target)


def test_a_candidate_is_planned_once(target: Target) -> None:
    """However often it is timed: planning takes the host longer than a small step takes the device."""
    planned: list[int] = []

    def clock(steps: Mapping[Choice, Prepared]) -> dict[Choice, list[float]]:
        for _ in range(3):
            for step in steps.values():
                step()
            planned.append(plan_forward.cache_info().misses + plan_backward.cache_info().misses)
        return {choice: [1.0] for choice in steps}

    run([PROBLEM], clock)
    assert planned[0] == planned[1] == planned[2]  # the first time was when its result was checked


def test_the_real_clock(target: Target) -> None:
    (result,) = tune.tune([PROBLEMS[2]], "cpu", repeats=2, adapter_dtype=torch.float32)
    assert all(0 < times.p20 <= times.median <= times.p80 < 60 for times in result.seconds.values())
    assert stored() == {PROBLEMS[2]: result.choice}


def test_nothing_is_left_in_force(target: Target) -> None:
    run(PROBLEMS[:1], favouring(ADDMM))
    assert not choices._tried


# What is stored is not measured again


def test_what_is_stored_is_kept(target: Target) -> None:
    """Also by another process; the rest is measured, and each result comes in its place."""
    first, second, third = PROBLEMS
    choices.store(target, {second: FUSED})
    forget()
    timed: list[Choice] = []
    finished: list[tune.Result] = []
    results = run(PROBLEMS, favouring(ADDMM, timed), finished=finished.append)
    assert results == finished
    assert [(result.problem, result.kept) for result in results] == [(first, False), (second, True), (third, False)]
    assert results[1] == tune.Result(second, ADDMM, FUSED, kept=True)
    assert len(timed) == sum(len(tune.candidates(problem, target)) for problem in (first, third))
    assert stored() == {first: ADDMM, second: FUSED, third: ADDMM}
    assert all(result.kept for result in run(PROBLEMS, lambda steps: pytest.fail("measured")))


def test_again_measures_it_anew(target: Target) -> None:
    choices.store(target, {PROBLEM: FUSED})
    (result,) = run([PROBLEM], favouring(ADDMM), again=True)
    assert (result.choice, result.kept) == (ADDMM, False)
    assert result.seconds.keys() == set(tune.candidates(PROBLEM, target))
    assert stored() == {PROBLEM: ADDMM}


def test_what_was_measured_elsewhere_or_in_another_precision_is_not_kept(target: Target, monkeypatch: Any) -> None:
    choices.store(replace(target, name="Another GPU"), {PROBLEM: FUSED})
    with monkeypatch.context() as patch:
        patch.setattr(choices, "matmul_precision", lambda dtype: "tf32")
        choices.store(target, {PROBLEM: FUSED})
    (result,) = run([PROBLEM], favouring(ADDMM))
    assert (result.choice, result.kept) == (ADDMM, False)


# What is wrong is not timed, and not stored


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


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_a_wrong_candidate_is_left_out(direction: str, target: Target, spoilt: Any) -> None:
    problem = replace(PROBLEM, direction=direction)
    spoilt(lambda options: options["HAS_PRODUCT"])
    timed: list[Choice] = []
    with pytest.warns(UserWarning, match=f"{direction} f32 16 x 32 -> 48 r=4 with dropout: fused .*is left out: its result is"):
        (result,) = tune.tune([problem], "cpu", clock=favouring(FUSED, timed))
    assert timed == [ADDMM]
    assert stored() == {problem: ADDMM}
    assert result.wrong
    assert len(result.left_out) == 3
    assert "OVER" in result.left_out[FUSED]


def test_a_wrong_default_gives_way(target: Target, spoilt: Any) -> None:
    spoilt(lambda options: not options["HAS_PRODUCT"])
    remarks: list[str] = []
    (result,) = tune.tune([PROBLEM], "cpu", clock=favouring(FUSED), remark=remarks.append)
    assert (result.default, result.choice, result.speedup) == (ADDMM, FUSED, None)
    assert len(remarks) == 1


def test_where_all_are_wrong_nothing_is_stored(target: Target, spoilt: Any) -> None:
    spoilt(lambda options: True)
    remarks: list[str] = []
    results = tune.tune([PROBLEM, PROBLEMS[2]], "cpu", clock=favouring(FUSED), remark=remarks.append)
    assert [result.choice for result in results] == [None, TORCH]
    assert results[0].skipped == "no candidate is left"
    assert remarks[4] == "forward f32 16 x 32 -> 48 r=4 with dropout is skipped: no candidate is left"
    assert stored() == {PROBLEMS[2]: TORCH}


@pytest.mark.parametrize("error", [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")])
def test_a_candidate_that_does_not_compile_is_left_out(error: Exception, target: Target, monkeypatch: Any) -> None:
    tile = tune.candidates(PROBLEM, target)[-1]
    assert tile.config is not None
    right = launch.launch

    def fail(plan: launch.Plan, *args: Any) -> None:
        if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"] and plan.options["BLOCK_M"] == tile.config.block_m:
            raise error
        right(plan, *args)

    monkeypatch.setattr(launch, "launch", fail)
    remarks: list[str] = []
    timed: list[Choice] = []
    (result,) = tune.tune([PROBLEM], "cpu", clock=favouring(tile, timed), remark=remarks.append)
    assert tile not in timed
    assert len(timed) == 3
    assert (result.choice, result.wrong) == (ADDMM, False)
    assert len(remarks) == 1
    assert f"{type(error).__name__}: " in remarks[0]


def test_a_lost_device_is_no_candidates_fault(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(launch, "launch", lost)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run([PROBLEM], favouring(FUSED))
    assert stored() == {}
