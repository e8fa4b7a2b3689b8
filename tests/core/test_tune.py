"""The tuner: what decides, what is stored, what is left out, and where it must not run.

The interpreter's GPU is given a name.  The timer is the test's own.
"""

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources
from tuned import NAMED, watch

from fastlora import backends, dispatch, tune
from fastlora.benchmark import trial
from fastlora.benchmark.clock import Prepared, Quantiles
from fastlora.dispatch import Problem, candidates, default_choice, store, stored
from fastlora.kernels import launch
from fastlora.kernels.gemm import gemm_kernel

pytestmark = pytest.mark.usefixtures("empty_cache")

PROBLEM = Problem("forward", torch.float32, 16, 32, 48, 4, True)
PROBLEMS = [PROBLEM, replace(PROBLEM, direction="backward"), replace(PROBLEM, in_features=48, dropout=False)]


@pytest.fixture
def run(monkeypatch):
    """run(problems, timer, **options) -> the outcomes on the interpreter."""

    def run(problems, timer, **options):
        monkeypatch.setattr(tune, "measure", lambda steps, device, repeats: timer(steps))
        return list(tune.tune(problems, "cpu", **options))

    return run


def favouring(winner):
    """A timer for which `winner` takes half the time of all others."""

    def timer(steps):
        for step in steps.values():
            step()
        return {choice: [0.5 if choice == winner else 1.0] * 5 for choice in steps}

    return timer


def not_measured(steps):
    pytest.fail("measured")


def times(median, spread=0.1):
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
def test_the_rule(seconds, chosen):
    assert tune.decide(seconds, "addmm") == chosen


def test_the_speedup_and_its_spread():
    seconds = {"addmm": Quantiles(9, 10, 12), "fused": Quantiles(4, 5, 6)}
    assert tune.Tuned(PROBLEM, "addmm", "fused", seconds).speedup == (9 / 6, 10 / 5, 12 / 4)
    assert tune.Tuned(PROBLEM, "addmm", "fused", {"fused": Quantiles(4, 5, 6)}).speedup is None
    assert tune.Tuned(PROBLEM, "addmm", skipped="out of memory").speedup is None


def test_the_winner_is_stored(target, run):
    for winner in ("fused", candidates(PROBLEM, target)[-1], "addmm"):
        (tuned,) = run([PROBLEM], favouring(winner), again=True)
        assert tuned.choice == winner == dispatch.choose(PROBLEM, target)
        assert stored(target) == {str(PROBLEM): winner}
    assert tuned.seconds.keys() == set(candidates(PROBLEM, target))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_step_runs_its_own_choice(problem, target, monkeypatch, run):
    """The timed half has the problem's size and mask, whatever was stored before."""
    store(target, {problem: "fused"})
    plans = []
    watch(monkeypatch, plans.append)

    def timer(steps):
        for choice, step in steps.items():
            prepared = step if isinstance(step, Prepared) else Prepared(lambda: None, lambda _, step=step: step())
            state = prepared.setup()
            plans.clear()
            prepared.run(state)
            gemms = [plan.options for plan in plans if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"]]
            assert len(gemms) == choice.startswith("fused")
            assert bool(plans) == (choice != "torch")
            if "/" in choice:
                assert choice.startswith("fused/{BLOCK_M},{BLOCK_N},{BLOCK_K},".format(**gemms[0]))
        return {choice: [1.0] for choice in steps}

    (tuned,) = run([problem], timer, again=True)
    assert tuned.seconds.keys() == set(candidates(problem, target))
    assert dispatch.choose(problem, target) == tuned.choice == default_choice(problem, target)


def test_the_real_clock(target):
    (tuned,) = tune.tune([PROBLEMS[2]], "cpu", repeats=2, adapter_dtype=torch.float32)
    assert all(0 < times.p20 <= times.median <= times.p80 < 60 for times in tuned.seconds.values())
    assert stored(target) == {str(PROBLEMS[2]): tuned.choice}


def test_what_is_stored_is_kept_unless_asked_for_again(target, run):
    first, second, third = PROBLEMS
    store(target, {second: "fused"})
    store(replace(target, name="Another GPU"), {first: "fused"})
    store(target, {replace(first, precision="tf32"): "fused"})
    outcomes = run(PROBLEMS, favouring("addmm"))
    assert [(tuned.problem, tuned.kept) for tuned in outcomes] == [(first, False), (second, True), (third, False)]
    assert outcomes[1] == tune.Tuned(second, "addmm", "fused", kept=True)
    assert all(tuned.kept for tuned in run(PROBLEMS, not_measured))
    (anew,) = run([second], favouring("addmm"), again=True)
    assert (anew.choice, anew.kept) == ("addmm", False)
    assert stored(target)[str(second)] == "addmm"


# Wrong results and trouble on the way


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(which): the launches of the GEMM kernel with such options write NaN, as an unfinished kernel would."""
    right = launch.launch

    def spoil(which):
        def wrong(plan, *args):
            right(plan, *args)
            if plan.kernel is gemm_kernel and which(plan.options):
                C = args[2]
                (C if isinstance(C, torch.Tensor) else C.base).fill_(torch.nan)

        monkeypatch.setattr(launch, "launch", wrong)

    return spoil


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_wrong_candidates_are_left_out_the_default_among_them(direction, target, spoilt, run):
    problem = replace(PROBLEM, direction=direction)
    others = set(candidates(problem, target)) - {"addmm"}
    spoilt(lambda options: options["HAS_PRODUCT"])
    (tuned,) = run([problem], favouring("fused"))
    assert (tuned.choice, tuned.wrong, tuned.seconds.keys(), tuned.left_out.keys()) == ("addmm", True, {"addmm"}, others)
    assert tuned.left_out["fused"].startswith("its result is wrong: ")
    assert stored(target) == {str(problem): "addmm"}
    spoilt(lambda options: not options["HAS_PRODUCT"])
    (tuned,) = run([problem], favouring("fused"), again=True)
    assert (tuned.default, tuned.choice, tuned.speedup) == ("addmm", "fused", None)
    assert stored(target) == {str(problem): "fused"}


def test_without_a_candidate_nothing_is_stored(target, spoilt, run):
    spoilt(lambda options: True)
    outcomes = run(PROBLEMS[1:], favouring("fused"))
    assert [(tuned.choice, tuned.skipped) for tuned in outcomes] == [(None, "no candidate is left"), ("torch", "")]
    assert stored(target) == {str(PROBLEMS[2]): "torch"}


@pytest.mark.parametrize("error", [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")])
def test_a_candidate_that_does_not_compile_is_left_out(error, target, monkeypatch, run):
    def fail(plan):
        if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"] and plan.options["BLOCK_M"] == 32:
            raise error

    watch(monkeypatch, fail)
    (tuned,) = run([PROBLEM], favouring("addmm"))
    assert tuned.left_out[candidates(PROBLEM, target)[-1]].startswith(f"{type(error).__name__}: ")
    assert (tuned.choice, tuned.wrong) == ("addmm", False)


def test_a_lost_device_is_no_candidates_fault(target, monkeypatch, run):
    def lost(plan):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    watch(monkeypatch, lost)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run([PROBLEM], favouring("fused"))
    assert stored(target) == {}


def test_a_problem_that_runs_out_of_memory_is_skipped(target, monkeypatch, run):
    right = trial.verify

    def full(provider, case, *args):
        if case.dropout_p == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return right(provider, case, *args)

    monkeypatch.setattr(trial, "verify", full)
    skipped, tuned = run([PROBLEMS[2], PROBLEM], favouring("fused"))
    assert (skipped.choice, tuned.choice) == (None, "fused")
    assert skipped.skipped == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert stored(target) == {str(PROBLEM): "fused"}


# Where it must not run


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("a CPU", RuntimeError, r"capability 8\.0 or newer; the device is cpu"),
        ("a capture", RuntimeError, "a CUDA graph cannot capture"),
        ("torch.compile", AssertionError, "forbidden callable <function tune"),
        ("no rate", ValueError, r"dropout_p must be at least 1/32768, .* got 0"),
    ],
)
def test_where_it_must_not_run(place, error, message, empty_cache, monkeypatch):
    """It measures and writes nothing."""
    device = "cuda" if place == "a capture" else "cpu"
    if place == "a capture":
        monkeypatch.setattr(tune, "available_backends", lambda device: backends.BACKENDS)
        monkeypatch.setattr(tune, "target_of", lambda device: NAMED)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def call(x):
        tune.tune([PROBLEM], device, **{"dropout_p": 0.0} if place == "no rate" else {})
        return x + 1

    with pytest.raises(error, match=message):
        (torch.compile(call, backend="eager") if place == "torch.compile" else call)(torch.ones(2))
    assert not empty_cache.exists()
