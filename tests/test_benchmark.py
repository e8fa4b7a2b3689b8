"""The benchmark measures right results only, in turn and warm, and counts bytes and operations that can be counted by hand."""

import contextlib
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, oracle
from fastlora.benchmark import baselines, ceilings, clock, contenders, memory, results, trial
from fastlora.benchmark.contenders import of_call
from fastlora.benchmark.shapes import MODELS
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)
DTYPES = list(oracle.FLOOR)
short = {"ids": lambda pair: "+".join(oracle.SHORT[dtype] for dtype in pair)}


def measured(case: Case = CASE, **options: Any) -> dict[str, benchmark.Measurement]:
    rivals = benchmark.contenders_for(case, CPU)
    return {result.contender: result for result in benchmark.run(rivals, case, CPU, repeats=2, copies=2, **options)}


@pytest.mark.parametrize("dtypes", DTYPES, **short)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_every_contender_is_held_against_its_own_mask(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    case = Case((M, K, N), R, *dtypes, dropout_p=dropout_p)
    judge = trial.Judge(case, benchmark.draw(case, CPU))
    rivals = benchmark.contenders_for(case, CPU)
    chained = ["chained addmm_"] if dtypes[0] == dtypes[1] else []
    assert [contender.name for contender in rivals] == ["frozen linear", "eager LoRA", "PEFT", *chained, "fastlora"]
    for contender in rivals:
        outputs = [row.output for row in judge.verify(contender)]
        assert outputs == (["y", "dx", "dA", "dB"] if contender.adapted else ["y", "dx"])


def test_under_torch_compile_each_is_held_against_the_mask_of_the_compiled_graph() -> None:
    judge = trial.Judge(CASE, benchmark.draw(CASE, CPU))
    rivals = benchmark.contenders_for(CASE, CPU, compiler="aot_eager")
    compiled = [contender for contender in rivals if contender.compiled]
    assert [contender.name for contender in compiled] == ["compiled eager", "compiled PEFT", "compiled fastlora"]
    assert [contender.name for contender in rivals] == [
        name for name in contenders.NAMES if "fused" not in name and "pre" not in name
    ]
    for contender in compiled:
        judge.verify(contender)
        with pytest.raises(benchmark.WrongResultError, match="is wrong on"):
            judge.verify(replace(contender, mask=lambda rows, cols, p, device: torch.rand(rows, cols) >= p))


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
def test_a_wrong_contender_is_not_timed(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = benchmark.contenders_for(CASE, CPU)[1]
    wrong = replace(eager, name="wrong", **change)
    monkeypatch.setattr(trial, "measure", lambda *args, **options: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="wrong is wrong on f32 96x64x80"):
        benchmark.run([eager, wrong], CASE, CPU, repeats=1)
    monkeypatch.undo()
    excluded: dict[str, Exception] = {}
    timed = benchmark.run([eager, wrong], CASE, CPU, repeats=1, copies=1, excluded=excluded)
    assert [result.contender for result in timed] == ["eager LoRA"]
    assert list(excluded) == ["wrong"]
    assert excluded["wrong"].__traceback__ is None


def test_the_frozen_linear_is_not_judged_by_the_lora_term() -> None:
    """Without dropout, contenders share the float64 results; the frozen linear has its own."""
    case = replace(CASE, dropout_p=0.0)
    frozen, eager = benchmark.contenders_for(case, CPU)[:2]
    judge = trial.Judge(case, benchmark.draw(case, CPU))
    for contender in (frozen, eager, frozen):
        judge.verify(contender)
    for contender in (replace(frozen, bind=eager.bind), replace(eager, bind=frozen.bind)):
        with pytest.raises(RuntimeError):
            judge.verify(contender)


@pytest.mark.parametrize("dtypes", DTYPES, **short)
def test_eager_is_peft(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The contender called eager is PEFT's layer, bit for bit, forward and backward, its dropout included."""
    case = Case((M, K, N), R, *dtypes, dropout_p=0.1)
    inputs = benchmark.draw(case, CPU)
    results_ = []
    for contender in benchmark.contenders_for(case, CPU)[1:3]:
        forward = contender.bind(inputs.weights, 1.5, 0.1)
        torch.manual_seed(3)
        y = forward(inputs.x)
        results_.append([y, *torch.autograd.grad(y, trial.trained(contender, inputs), inputs.dy)])
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


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 32), (10 << 20, 4), (1 << 30, 2)])
def test_inputs_exceed_the_cache(nbytes: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 20 << 20)
    assert clock.copies_beyond_cache(nbytes, CPU) == copies
    monkeypatch.undo()
    assert 1 << 16 <= clock.cache_bytes(CPU) < 1 << 32


def test_steps_take_the_sets_in_turn() -> None:
    """Every call runs on the next set of inputs, and backward on the set of its own forward."""
    frozen = benchmark.contenders_for(CASE, CPU)[0]
    sets = [benchmark.draw(CASE, CPU, index) for index in range(3)]
    assert len({float(inputs.dy.sum()) for inputs in sets}) == 3
    forward, backward, both = trial.steps_of(frozen, CASE, sets).values()
    for inputs in (*sets, sets[0]):
        assert torch.equal(forward(), F.linear(inputs.x, inputs.weights.weight))
    for step, inputs in ((backward, sets[1]), (both, sets[2])):
        assert torch.equal(step()[0], inputs.dy @ inputs.weights.weight)


def test_no_two_steps_in_succession_read_the_same_set() -> None:
    """Whoever is timed side by side: what one contender has left in the cache is not what the next one reads."""
    read: list[int] = []

    def spied(bind: Any) -> Any:
        def bound(weights: benchmark.Weights, *options: float) -> Any:
            forward = bind(weights, *options)
            return lambda x: read.append(x.data_ptr()) or forward(x)

        return bound

    rivals = [replace(rival, bind=spied(rival.bind)) for rival in benchmark.contenders_for(CASE, CPU)[:3]]
    benchmark.run(rivals, CASE, CPU, repeats=4, copies=3)
    timed = read[len(rivals) : -2 * len(rivals)]  # before, each was checked; after, its bytes were counted
    assert len(timed) == 3 * len(rivals) * (clock.WARMUP + 4)
    assert timed == timed[:3] * (len(timed) // 3)
    assert len(set(timed)) == 3


def test_quantiles() -> None:
    assert benchmark.quantiles([4.0, 5.0, 6.0, 7.0, 8.0]) == pytest.approx((4.8, 6.0, 7.2))
    assert benchmark.quantiles([2.0]) == (2.0, 2.0, 2.0)


def test_saved_bytes() -> None:
    """The frozen linear saves nothing but W; fastlora x, S and the seed; eager the dropped x, its mask, and S."""
    saved = {name: result.saved_bytes for name, result in measured().items()}
    assert saved["frozen linear"] == 0
    assert saved["fastlora"] == 4 * M * K + 4 * M * R + 8
    assert saved["eager LoRA"] == saved["PEFT"] == 2 * 4 * M * K + 4 * M * R
    assert saved["chained addmm_"] == 4 * M * K + M * K + 4 * M * R


def test_saved_bytes_counts_a_storage_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert benchmark.saved_bytes(lambda: (x.t() * x) @ x, []) == 2 * 400
    assert benchmark.saved_bytes(lambda: (x.t() * x) @ x, [x]) == 400


def test_peak_bytes_of_known_allocations() -> None:
    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        third = torch.empty(500)
        del second, third

    assert memory.peak_bytes(step, CPU) == 4 * 4000


def test_peak_bytes_see_inside_an_operator() -> None:
    """What fastlora's own operators allocate is counted, though no dispatch mode could see it."""
    peaks = {name: result.peak_bytes for name, result in measured().items()}
    y, dx, adapters = 4 * M * N, 4 * M * K, 4 * R * (K + N)
    assert peaks["frozen linear"] == y + dx
    assert peaks["fastlora"] > y + dx + adapters + 4 * M * R


def test_the_floor_counts_each_operation_and_byte_once() -> None:
    case = Case((2, 3, 5), rank=7, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=True)
    assert ceilings.operations(case, "forward", adapted=False) == 2 * 2 * 3 * 5
    assert ceilings.operations(case, "forward") == 2 * 2 * 3 * 5 + 2 * 2 * 7 * (3 + 5)
    assert ceilings.operations(case, "backward") == 2 * 2 * 3 * 5 + 4 * 2 * 7 * (3 + 5)
    frozen = 2 * (2 * 3 + 5 * 3 + 2 * 5)
    assert ceilings.compulsory_bytes(case, "backward", adapted=False) == frozen
    assert ceilings.compulsory_bytes(case, "forward") == frozen + 2 * 5 + 4 * 7 * (3 + 5) + 4 * 2 * 7
    assert ceilings.compulsory_bytes(case, "backward") == frozen + 2 * 3 * 2 + 2 * 4 * 7 * (3 + 5) + 4 * 2 * 7
    compute, memory_ = benchmark.Ceilings(torch.bfloat16, 1.0, math.inf), benchmark.Ceilings(torch.bfloat16, math.inf, 1.0)
    both = "forward + backward"
    assert compute.floor(case, both) == 4 * 2 * 3 * 5 + 6 * 2 * 7 * (3 + 5)
    assert memory_.floor(case, "backward", adapted=False) == frozen


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    times = {"gemm": [2.0, 1.0], "copy": [4.0, 8.0]}
    monkeypatch.setattr(ceilings, "measure", lambda steps, *_: [step() for step in steps.values()] and times)
    found = benchmark.measure_ceilings(torch.float32, CPU)
    assert (found.gemm, found.copy) == (2 * 64**3, (2 << 20) / 4)


def test_rows(tmp_path: Any) -> None:
    found = measured()
    rows = results.rows_of(list(found.values()), CASE, benchmark.Ceilings(torch.float32, 1e9, math.inf))
    assert len(rows) == 3 * len(found)
    row = next(row for row in rows if (row["contender"], row["pass"]) == ("fastlora", "forward"))
    seconds = {name: result.quantiles("forward").median for name, result in found.items()}
    assert row["over_frozen"] == pytest.approx(seconds["fastlora"] / seconds["frozen linear"])
    assert row["over_eager"] == pytest.approx(seconds["fastlora"] / seconds["eager LoRA"])
    assert row["roofline_percent"] == pytest.approx(100 * (2 * M * (K * N + R * (K + N)) / 1e9) / seconds["fastlora"])
    assert row["saved_bytes"] is None
    results.write_csv([row, {"other": 1}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines()[0].endswith(",other")


def test_an_interrupted_write_leaves_the_last_results(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    assert results.read_json(path) is None
    results.write_json({"rows": [1]}, path)
    monkeypatch.setattr(json, "dump", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write_json({"rows": [2]}, path)
    assert results.read_json(path) == {"rows": [1]}
    assert list(tmp_path.glob("*.json")) == [path]


def test_the_environment_names_the_code_and_the_machine() -> None:
    facts = results.environment(CPU)
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"commit", "triton", "peft", "python", "device", "threads", "date"}


def test_linears_of_the_models() -> None:
    """The linears of a layer, times the layers, with embeddings and head make up the published parameter counts."""
    published = {
        "Llama-3.2-1B": 1.236e9,
        "Llama-3.1-8B": 8.03e9,
        "Llama-3.1-70B": 70.55e9,
        "Qwen3-8B": 8.19e9,
        "Qwen2.5-32B": 32.76e9,
    }
    tied = {"Llama-3.2-1B"}
    for name, decoder in MODELS.items():
        layer = sum(len(linear.names) * linear.in_features * linear.out_features for linear in decoder.linears)
        total = decoder.layers * layer + decoder.vocabulary * decoder.hidden * (1 if name in tied else 2)
        assert total == pytest.approx(published[name], rel=2e-3), name
        assert sorted(n for linear in decoder.linears for n in linear.names) == sorted(
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        )
    assert [linear.names for linear in MODELS["Qwen2.5-32B"].linears if linear.bias] == [("q_proj",), ("k_proj", "v_proj")]
