"""The benchmark measures right results only, in turn and warm."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, oracle
from fastlora.benchmark import baselines, clock, providers, trial
from fastlora.benchmark.providers import of_call
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)
DTYPES = list(oracle.FLOOR)
short = {"ids": lambda pair: "+".join(oracle.SHORT[dtype] for dtype in pair)}


@pytest.mark.parametrize("dtypes", DTYPES, **short)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_every_provider_is_held_against_its_own_mask(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    case = Case((M, K, N), R, *dtypes, dropout_p=dropout_p)
    judge = trial.Judge(case, benchmark.draw(case, CPU))
    rivals = benchmark.providers_for(case, CPU)
    chained = ["chained addmm_"] if dtypes[0] == dtypes[1] else []
    assert [provider.name for provider in rivals] == ["frozen linear", "eager LoRA", "PEFT", *chained, "fastlora"]
    for provider in rivals:
        outputs = [row.output for row in judge.verify(provider)]
        assert outputs == (["y", "dx", "dA", "dB"] if provider.adapted else ["y", "dx"])


def test_under_torch_compile_each_is_held_against_the_mask_of_the_compiled_graph() -> None:
    judge = trial.Judge(CASE, benchmark.draw(CASE, CPU))
    rivals = benchmark.providers_for(CASE, CPU, compiler="aot_eager")
    compiled = [provider for provider in rivals if provider.compiled]
    assert [provider.name for provider in compiled] == ["compiled eager", "compiled PEFT", "compiled fastlora"]
    assert [provider.name for provider in rivals] == [
        name for name in providers.NAMES if "fused" not in name and "pre" not in name
    ]
    for provider in compiled:
        judge.verify(provider)
        with pytest.raises(benchmark.WrongResultError, match="is wrong on"):
            judge.verify(replace(provider, mask=lambda rows, cols, p, device: torch.rand(rows, cols) >= p))


def doubled(*tensors: Tensor, **options: float) -> Tensor:
    return baselines.eager_lora(*tensors, **options) * 1.01


@pytest.mark.parametrize(
    "change",
    [
        {"mask": lambda rows, cols, p, device: torch.rand(rows, cols) >= p},
        {"keep_scale": lambda p: 1.0},
        {"bind": of_call(baselines.frozen_linear)},
        {"bind": of_call(doubled)},
        {"bind": of_call(lambda x, *rest, **options: baselines.eager_lora(x.detach(), *rest, **options))},
        {"bind": of_call(lambda *tensors, **options: baselines.eager_lora(*tensors, **options).double())},
    ],
    ids=["mask", "scale", "no adapter", "factor", "no gradient", "dtype"],
)
def test_a_wrong_provider_is_not_timed(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = benchmark.providers_for(CASE, CPU)[1]
    wrong = replace(eager, name="wrong", **change)
    monkeypatch.setattr(trial, "measure", lambda *args, **options: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="wrong is wrong on f32 96x64x80"):
        benchmark.run([eager, wrong], CASE, CPU, repeats=1)
    monkeypatch.undo()
    excluded: dict[str, Exception] = {}
    timed = benchmark.run([eager, wrong], CASE, CPU, repeats=1, copies=1, excluded=excluded)
    assert [result.provider for result in timed] == ["eager LoRA"]
    assert list(excluded) == ["wrong"]
    assert excluded["wrong"].__traceback__ is None


def test_the_frozen_linear_is_not_judged_by_the_lora_term() -> None:
    """Without dropout, providers share the float64 results; the frozen linear has its own."""
    case = replace(CASE, dropout_p=0.0)
    frozen, eager = benchmark.providers_for(case, CPU)[:2]
    judge = trial.Judge(case, benchmark.draw(case, CPU))
    for provider in (frozen, eager, frozen):
        judge.verify(provider)
    for provider in (replace(frozen, bind=eager.bind), replace(eager, bind=frozen.bind)):
        with pytest.raises(RuntimeError):
            judge.verify(provider)


@pytest.mark.parametrize("dtypes", DTYPES, **short)
def test_eager_is_peft(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The provider called eager is PEFT's layer, bit for bit, forward and backward, its dropout included."""
    case = Case((M, K, N), R, *dtypes, dropout_p=0.1)
    inputs = benchmark.draw(case, CPU)
    results_ = []
    for provider in benchmark.providers_for(case, CPU)[1:3]:
        forward = provider.bind(inputs.weights, 1.5, 0.1)
        torch.manual_seed(3)
        y = forward(inputs.x)
        results_.append([y, *torch.autograd.grad(y, trial.trained(provider, inputs), inputs.dy)])
    assert all(torch.equal(ours, of_peft) for ours, of_peft in zip(*results_, strict=True))


def test_all_are_warm_and_visited_each_round_in_changing_order() -> None:
    visits: list[str] = []

    def fake(name: str, step: clock.Prepared) -> float:
        step.run(step.setup())
        return float(len(visits))

    steps = {name: (lambda name=name: visits.append(name)) for name in "abc"}
    told: list[str] = []
    seconds = benchmark.measure(steps, CPU, 5, clock=fake, progress=told.append)
    rounds = [visits[i : i + 3] for i in range(0, len(visits), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(rounds) == len(told) == clock.WARMUP + 5
    assert len({tuple(order) for order in rounds[clock.WARMUP :]}) > 1
    assert sorted(time for times in seconds.values() for time in times) == [float(i) for i in range(3 * clock.WARMUP + 1, 25)]
    assert all(len(times) == 5 for times in seconds.values())


def test_only_the_second_half_of_a_prepared_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(seconds: float) -> float:
        nonlocal now
        now += seconds
        return seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    step = benchmark.Prepared(lambda: wait(100.0) / 10, lambda state: wait(state))
    seconds = benchmark.measure({"half": step, "whole": lambda: step()}, CPU, 4)
    assert seconds["half"] == pytest.approx([10.0] * 4)
    assert seconds["whole"] == pytest.approx([110.0] * 4)
    limited = benchmark.measure({"half": step}, CPU, 100, limit=20 * 110.0)
    assert len(limited["half"]) == 21
    assert len(benchmark.measure({"half": step}, CPU, 100, limit=1.0)["half"]) == clock.FEWEST_ROUNDS


def test_cuda_events_enclose_the_run_and_the_device_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait" if cycles else "no wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    step = benchmark.Prepared(lambda: log.append("setup"), lambda _: log.append("run"))
    timer = benchmark.CudaClock(torch.device("cuda"))
    seconds = benchmark.measure({"step": step}, torch.device("cuda"), 1, warmup=1, clock=timer)
    visit = ["event", "run", "event", "synchronize"]
    assert log == ["setup", "no wait", *visit, "setup", "wait", *visit]
    assert seconds == {"step": [0.25]}
    assert len(timer.launches["step"]) == 2
    timer.launches["step"] = [1.0] * clock.WARMUP + [2.0]
    assert benchmark.timed_launches(timer) == {"step": [2.0]}
    assert benchmark.timed_launches(benchmark.device_clock(CPU)) == {}


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 32), (10 << 20, 4), (1 << 30, 2)])
def test_inputs_exceed_the_cache(nbytes: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 20 << 20)
    assert clock.copies_beyond_cache(nbytes, CPU) == copies
    monkeypatch.undo()
    assert 1 << 16 <= clock.cache_bytes(CPU) < 1 << 32


def test_steps_take_the_sets_in_turn() -> None:
    """Every call runs on the next set of inputs, and backward on the set of its own forward."""
    frozen = benchmark.providers_for(CASE, CPU)[0]
    sets = [benchmark.draw(CASE, CPU, index) for index in range(3)]
    assert len({float(inputs.dy.sum()) for inputs in sets}) == 3
    forward, backward, both = trial.steps_of(frozen, CASE, sets).values()
    for inputs in (*sets, sets[0]):
        assert torch.equal(forward(), F.linear(inputs.x, inputs.weights.weight))
    for step, inputs in ((backward, sets[1]), (both, sets[2])):
        assert torch.equal(step()[0], inputs.dy @ inputs.weights.weight)


def test_no_two_steps_in_succession_read_the_same_set() -> None:
    """Whoever is timed side by side: what one provider has left in the cache is not what the next one reads."""
    read: list[int] = []

    def spied(bind: Any) -> Any:
        def bound(weights: benchmark.Weights, *options: float) -> Any:
            forward = bind(weights, *options)
            return lambda x: read.append(x.data_ptr()) or forward(x)

        return bound

    rivals = [replace(rival, bind=spied(rival.bind)) for rival in benchmark.providers_for(CASE, CPU)[:3]]
    benchmark.run(rivals, CASE, CPU, repeats=4, copies=3)
    timed = read[len(rivals) : -2 * len(rivals)]  # before, each was checked; after, its bytes were counted
    assert len(timed) == 3 * len(rivals) * (clock.WARMUP + 4)
    assert timed == timed[:3] * (len(timed) // 3)
    assert len(set(timed)) == 3


def test_quantiles() -> None:
    assert benchmark.quantiles([4.0, 5.0, 6.0, 7.0, 8.0]) == pytest.approx((4.8, 6.0, 7.2))
    assert benchmark.quantiles([2.0]) == (2.0, 2.0, 2.0)
