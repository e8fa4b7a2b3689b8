"""The benchmark measures right results only, in turn and warm."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, oracle
from fastlora.benchmark import clock, providers, trial
from fastlora.benchmark.providers import of_call
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)
in_all_dtypes = pytest.mark.parametrize("dtypes", oracle.FLOOR, ids=lambda pair: "+".join(map(oracle.SHORT.get, pair)))


@in_all_dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_every_provider_is_judged_with_its_own_mask(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    case = Case((M, K, N), R, *dtypes, dropout_p=dropout_p)
    judge = trial.Judge(case, trial.draw(case, CPU))
    rivals = providers.providers_for(case, CPU)
    chained = ["chained addmm_"] if dtypes[0] == dtypes[1] else []
    assert [provider.name for provider in rivals] == ["frozen linear", "eager LoRA", "PEFT", *chained, "fastlora"]
    for provider in rivals:
        outputs = [row.output for row in judge.verify(provider)]
        assert outputs == (["y", "dx", "dA", "dB"] if provider.name != "frozen linear" else ["y", "dx"])


def other_mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
    return torch.rand(rows, cols) >= p


def test_under_torch_compile_each_is_judged_with_the_mask_of_the_compiled_graph() -> None:
    judge = trial.Judge(CASE, trial.draw(CASE, CPU))
    rivals = providers.providers_for(CASE, CPU, compiler="aot_eager")
    here = [name for name in providers.NAMES if name not in ("fastlora fused", "fastlora addmm")]
    assert [provider.name for provider in rivals] == here
    for provider in rivals:
        if provider.name in providers.COMPILED:
            judge.verify(provider)
            with pytest.raises(trial.WrongResultError, match="is wrong on"):
                judge.verify(replace(provider, mask=other_mask))


def wrong(change: Any) -> dict[str, Any]:
    return {"bind": of_call(lambda *tensors, **options: change(providers.eager_lora(*tensors, **options)))}


@pytest.mark.parametrize(
    "change",
    [
        {"mask": other_mask},
        {"keep_scale": lambda p: 1.0},
        {"bind": of_call(providers.frozen_linear)},
        wrong(lambda y: y * 1.01),
        wrong(Tensor.double),
        {"bind": of_call(lambda x, *rest, **options: providers.eager_lora(x.detach(), *rest, **options))},
    ],
    ids=["mask", "scale", "no adapter", "factor", "dtype", "no gradient"],
)
def test_a_wrong_provider_is_not_timed(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, eager = providers.providers_for(CASE, CPU)[:2]
    planted = replace(eager, name="planted", **change)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "measure", lambda *args, **options: pytest.fail("timed"))
        with pytest.raises(trial.WrongResultError, match="planted is wrong on f32 96x64x80"):
            benchmark.run([frozen, eager, planted], CASE, CPU, repeats=1)
    excluded: dict[str, Exception] = {}
    rows, _ = benchmark.run([frozen, eager, planted], CASE, CPU, repeats=1, copies=1, excluded=excluded)
    assert {row["provider"] for row in rows} == {"frozen linear", "eager LoRA"}
    assert list(excluded) == ["planted"]
    assert excluded["planted"].__traceback__ is None


def test_the_frozen_linear_is_not_judged_by_the_lora_term() -> None:
    case = replace(CASE, dropout_p=0.0)
    frozen, eager = providers.providers_for(case, CPU)[:2]
    judge = trial.Judge(case, trial.draw(case, CPU))
    for provider in (frozen, eager, frozen):
        judge.verify(provider)
    for provider in (replace(frozen, bind=eager.bind), replace(eager, bind=frozen.bind)):
        with pytest.raises(trial.WrongResultError):
            judge.verify(provider)


@in_all_dtypes
def test_eager_is_peft(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The provider called eager is PEFT's layer, bit for bit, forward and backward, its dropout included."""
    case = Case((M, K, N), R, *dtypes, dropout_p=0.1)
    inputs = trial.draw(case, CPU)
    both = []
    for provider in providers.providers_for(case, CPU)[1:3]:
        forward = provider.bind(inputs.weights, 1.5, 0.1)
        torch.manual_seed(3)
        y = forward(inputs.x)
        both.append([y, *torch.autograd.grad(y, trial.trained(provider, inputs), inputs.dy)])
    assert all(torch.equal(ours, of_peft) for ours, of_peft in zip(*both, strict=True))


def test_all_are_warm_and_visited_each_round_in_changing_order() -> None:
    visits: list[str] = []

    def fake(name: str, step: clock.Prepared) -> float:
        step.run(step.setup())
        return float(len(visits))

    steps = {name: (lambda name=name: visits.append(name)) for name in "abc"}
    told: list[str] = []
    seconds = clock.measure(steps, CPU, 5, clock=fake, progress=told.append)
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
    step = clock.Prepared(lambda: wait(100.0) / 10, lambda state: wait(state))
    seconds = clock.measure({"half": step, "whole": lambda: step()}, CPU, 4)
    assert seconds["half"] == pytest.approx([10.0] * 4)
    assert seconds["whole"] == pytest.approx([110.0] * 4)
    assert len(clock.measure({"half": step}, CPU, 100, limit=20 * 110.0)["half"]) == 21
    assert len(clock.measure({"half": step}, CPU, 100, limit=1.0)["half"]) == clock.FEWEST_ROUNDS


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
    step = clock.Prepared(lambda: log.append("setup"), lambda _: log.append("run"))
    timer = clock.CudaClock(torch.device("cuda"))
    seconds = clock.measure({"step": step}, torch.device("cuda"), 1, clock=timer)
    visit = ["event", "run", "event", "synchronize"]
    assert log == ["setup", "no wait", *visit, *["setup", "wait", *visit] * clock.WARMUP]
    assert seconds == {"step": [0.25]}
    assert len(timer.launches["step"]) == clock.WARMUP + 1


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 32), (10 << 20, 4), (1 << 30, 2)])
def test_inputs_exceed_the_cache(nbytes: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 16 <= clock.cache_bytes(CPU) < 1 << 32
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 20 << 20)
    assert clock.copies_beyond_cache(nbytes, CPU) == copies


def test_steps_take_the_sets_in_turn() -> None:
    """Every call runs on the next set of inputs, and backward on the set of its own forward."""
    frozen = providers.providers_for(CASE, CPU)[0]
    sets = [trial.draw(CASE, CPU, index) for index in range(3)]
    assert len({float(inputs.dy.sum()) for inputs in sets}) == 3
    forward, backward, both = trial.steps_of(frozen, CASE, sets).values()
    for inputs in (*sets, sets[0]):
        assert torch.equal(forward()[1], F.linear(inputs.x, inputs.weight))
    for step, inputs in ((backward, sets[1]), (both, sets[2])):
        assert torch.equal(step()[0], inputs.dy @ inputs.weight)


def test_no_two_steps_in_succession_read_the_same_set() -> None:
    """What one provider has left in the cache is not what the next one reads."""
    read: list[int] = []

    def spied(bind: Any) -> Any:
        def bound(weights: oracle.Weights, *options: float) -> Any:
            forward = bind(weights, *options)
            return lambda x: read.append(x.data_ptr()) or forward(x)

        return bound

    rivals = [replace(rival, bind=spied(rival.bind)) for rival in providers.providers_for(CASE, CPU)[:3]]
    benchmark.run(rivals, CASE, CPU, repeats=4, copies=3)
    timed = read[len(rivals) : -2 * len(rivals)]  # before, each was checked; after, its bytes were counted
    assert len(timed) == 3 * len(rivals) * (clock.WARMUP + 4)
    assert timed == timed[:3] * (len(timed) // 3)
    assert len(set(timed)) == 3


def test_quantiles() -> None:
    assert clock.quantiles([4.0, 5.0, 6.0, 7.0, 8.0]) == pytest.approx((4.8, 6.0, 7.2))
    assert clock.quantiles([2.0]) == (2.0, 2.0, 2.0)
