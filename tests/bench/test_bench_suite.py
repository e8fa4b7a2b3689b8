"""`pytest benches` at toy size: times taken in turn reach pytest-benchmark and the files; runs resume."""

import csv
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastlora.benchmark import PASSES, WrongResultError, trial
from fastlora.benchmark.clock import WARMUP, CudaClock, Prepared
from fastlora.peft import Report

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LINEAR_PROVIDERS = ["frozen linear", "eager LoRA", "PEFT", "chained addmm_", "fastlora"]
LAYER, TRAINING_STEP = "decoder layer", "training step"
Benches = dict[str, ModuleType]
ToyRun = tuple[Path, dict, dict]


def test_the_models_come_after_the_most_important_linears() -> None:
    command = [sys.executable, "-m", "pytest", "benches", "--collect-only", "-q", "--device", "cpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tests = re.findall(r"test_(\w+)\.py::(.*)", done.stdout)
    groups = [(file, [name for _, name in found]) for file, found in itertools.groupby(tests, lambda test: test[0])]
    assert [file for file, _ in groups] == ["linears", "decoder", "linears"]
    assert all("2048x1024x1024-r16" in name for name in groups[0][1])
    assert not any("2048x1024x1024-r16" in name for name in groups[2][1])


def test_a_run_does_not_replace_the_committed_results_unless_asked() -> None:
    parser = pytest.Parser(_ispytest=True)
    importlib.import_module("benches.conftest").pytest_addoption(parser)
    assert parser.parse([]).results == ROOT / "build" / "benchmarks"
    assert parser.parse(["--results", "benches/results"]).results == Path("benches/results")
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()


def test_pytest_benchmark_shows_the_times_that_were_measured_in_turn(toy_run: ToyRun) -> None:
    _, own, saved = toy_run
    assert saved["machine_info"]["fastlora"] == own["facts"]
    rows = {(row["id"], row["pass"], row["provider"]): row for row in own["rows"]}
    assert len(saved["benchmarks"]) == len(rows)
    for entry in saved["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        row = rows[info["id"], info["pass"], info["provider"]]
        assert entry["group"] == " ".join(dict.fromkeys((info["id"], info["pass"])))
        assert info == {key: value for key, value in row.items() if value is not None}
        assert stats["rounds"] == len(stats["data"]) == 3
        assert stats["median"] * 1e3 == pytest.approx(row["median_ms"])
        assert entry["options"]["timer"].endswith("recorded_clock")


def test_every_provider_and_pass_of_every_size(toy_run: ToyRun) -> None:
    folder, own, _ = toy_run
    found: dict[str, dict[str, list[str]]] = {}
    for row in own["rows"]:
        found.setdefault(row["id"], {}).setdefault(row["pass"], []).append(row["provider"])
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    compiled = [*LINEAR_PROVIDERS, "compiled eager", "compiled PEFT", "compiled fastlora"]
    of_layer = ["frozen layer", "PEFT", "fastlora"]
    assert list(found.items()) == [
        ("f32-96x64x80-r8-p0.1", dict.fromkeys(PASSES, compiled)),
        ("f32-96x64x80-r8-p0", dict.fromkeys(PASSES, LINEAR_PROVIDERS)),
        (LAYER, dict.fromkeys(PASSES, of_layer)),
        (TRAINING_STEP, {TRAINING_STEP: ["PEFT", "fastlora"]}),
    ]
    assert own["facts"]["repeats"] == 3
    assert not own["not_reached"]
    (file,) = folder.glob("*.csv")
    with file.open() as text:
        written = list(csv.DictReader(text))
    assert len(written) == len(own["rows"])
    assert {(row["torch"], row["repeats"]) for row in written} == {(torch.__version__, "3")}
    rates = [{name: float(row[name]) for name in ("gemm_tflops", "copy_gbps")} for row in written]
    assert own["ceilings"] == {"float32": rates[0]}
    assert all(rate == rates[0] for rate in rates)


def make_suite(benches: Benches, path: Path, **options: Any) -> Any:
    told: list[str] = []
    defaults = {"repeats": 1, "compiler": None, "budget": float("inf"), "toy": True, "tell": told.append}
    suite = benches["suite"].Suite(path, CPU, **{**defaults, **options})
    suite.told = told
    return suite


def test_a_run_stops_with_its_budget_and_resumes(benches: Benches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.benchmark.ceilings.SIZES", {"cpu": (32, 1 << 16)})
    monkeypatch.setattr("fastlora.environment.commit", lambda: "abc")
    path, (first, second) = tmp_path / "results.json", benches["grid"].sizes("toy", CPU)
    not_measured = benches["suite"].NotMeasuredError
    suite = make_suite(benches, path)
    suite.linear(first, "fastlora", "forward")
    suite.deadline = 0.0
    suite.linear(first, "eager LoRA", "backward")
    written = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("fastlora.atomic.os.fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            suite.close()
    assert path.read_text() == written
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(not_measured, match="budget is spent"):
        suite.linear(second, "fastlora", "forward")
    assert any("not reached" in line for line in suite.summary())
    suite.content["rows"][0].update(p20_ms=1.0, p80_ms=1.6)
    assert any("scatter widely" in line for line in suite.summary())
    suite.close()

    suite = make_suite(benches, path, resume=True)
    with pytest.raises(not_measured, match="measured before"):
        suite.linear(first, "fastlora", "forward")
    suite.linear(second, "fastlora", "forward")
    suite.close()
    content = json.loads(path.read_text())
    assert list(dict.fromkeys(row["id"] for row in content["rows"])) == [first.id, second.id]
    assert content["not_reached"] == []

    for changed in ({"torch": "1.0"}, {"repeats": 2}):
        path.write_text(json.dumps({**content, "facts": {**content["facts"], **changed}}))
        suite = make_suite(benches, path, resume=True)
        assert "under other conditions" in suite.told[0]
        assert suite.content["rows"] == []


def test_large_times_and_launches_of_a_gpu(benches: Benches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeClock(CudaClock):
        def __call__(self, name: Hashable, step: Prepared) -> float:
            step()
            launches = self.launches.setdefault(name, [])
            launches.append(1.0 if len(launches) < WARMUP else 2e-3)
            return 4.52

    monkeypatch.setattr(trial, "device_clock", FakeClock)
    suite = make_suite(benches, tmp_path / "results.json", repeats=3)
    seconds, row = suite.model(LAYER, "fastlora", "forward")
    assert (seconds, row["median_ms"], row["launch_ms"]) == ([4.52] * 3, 4520.0, 2.0)
    assert suite.told == ["decoder layer: frozen layer 4520, PEFT 4520, fastlora 4520 ms"]


@pytest.mark.parametrize(
    ("broken", "error"),
    [("chained_addmm", None), ("frozen_linear", None), ("chained_addmm", OutOfResources(300000, 232448, "shared memory"))],
    ids=["wrong", "floor", "raises"],
)
def test_a_broken_provider_fails_alone_and_a_broken_floor_fails_all(
    broken: str, error: Exception | None, benches: Benches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.benchmark.ceilings.SIZES", {"cpu": (32, 1 << 16)})
    calls = []

    def wrong(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(x)
        if error:
            raise error
        return torch.nn.functional.linear(x, weight * 2)

    monkeypatch.setattr(f"fastlora.benchmark.providers.{broken}", wrong)
    suite, size = make_suite(benches, tmp_path / "results.json"), benches["grid"].sizes("toy", CPU)[1]
    for name in LINEAR_PROVIDERS:
        if broken == "frozen_linear" or name == "chained addmm_":
            with pytest.raises(type(error or WrongResultError("")), match="out of resource" if error else "is wrong on"):
                suite.linear(size, name, "forward")
        else:
            suite.linear(size, name, "forward")
    assert len(calls) == 1  # judged once, for all tests of the size


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ImportError("no module named peft"), "ImportError", "peft"),
        (torch.OutOfMemoryError("too much"), "NotMeasuredError", r"does not fit into the memory of .*too much"),
    ],
)
def test_what_fails_is_tried_once_and_reported_to_each_test(
    error: Exception, raised: str, message: str, benches: Benches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(args)
        raise error

    monkeypatch.setitem(benches["decoder"].STEPS, LAYER, fail)
    suite = make_suite(benches, tmp_path / "results.json")
    for provider in ("PEFT", "fastlora"):
        with pytest.raises(Exception, match=message) as caught:
            suite.model(LAYER, provider, "forward")
        assert type(caught.value).__name__ == raised
    assert len(calls) == 1


def test_a_model_that_falls_back_or_is_wrong_is_not_called_fastlora(benches: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = benches["decoder"]
    setting = decoder.setting(LAYER, CPU, toy=True)
    accelerate = decoder.fastlora.accelerate

    def wrong(model: torch.nn.Module) -> Report:
        for name, parameter in model.named_parameters():
            if "q_proj.lora_A" in name:
                parameter.data *= 1.001
        return accelerate(model)

    for owner, name, planted, message in (
        (decoder.fastlora, "accelerate", lambda model: Report((), left=(("q_proj", "planted"),)), "left, planted"),
        (decoder.fastlora.peft, "fallbacks", lambda model: {"planted": {"q_proj": 1}}, "ran PEFT's forward"),
        (decoder.fastlora, "accelerate", wrong, "is wrong, so it is not timed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, planted)
            with pytest.raises(WrongResultError, match=message):
                decoder.layer_steps(setting, CPU, copies=1)


@pytest.mark.parametrize(("name", "count"), [("quick", 11), ("full", 142), ("everything", 19 * 64 + 6)])
def test_grids(name: str, count: int, benches: Benches) -> None:
    grid = benches["grid"]
    sizes = grid.sizes(name, torch.device("cuda"))
    ids = [size.id for size in sizes]
    assert len(set(ids)) == len(ids) == count
    assert ids[0] == "bf16-8192x4096x4096-r16-p0.1"
    assert sizes[0].compiled
    square = [size.case for size in sizes if size.case.shape[1:] == (4096, 4096)]
    cases = {(case.shape[0], case.rank, case.dropout_p, case.adapters) for case in square}
    if name == "quick":
        assert {(rows, 16, 0.1, torch.bfloat16) for rows in (1, 128)} <= cases
        assert len(ids) <= 1 + benches["report"].LISTED
    else:
        assert len(cases) == 4 * 4 * 2 * 2 + 3 * 2
        assert {(rows, 16, p, torch.bfloat16) for rows in (1, 16, 128) for p in (0.0, 0.1)} <= cases
        for (model, decoder), rows in itertools.product(grid.MODELS.items(), grid.ROWS):
            for linear in decoder.linears:
                shape = rows, linear.in_features, linear.out_features
                found = [s for s in sizes if s.case.shape == shape and s.case.bias == linear.bias]
                assert any(f"{model} {', '.join(linear.names)}" in s.used_by for s in found)
    assert all(size.case.shape[0] <= 2048 for size in grid.sizes(name, CPU))
