"""`pytest benches` at toy size: times taken in turn reach pytest-benchmark and the files; runs resume."""

import csv
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

from fastlora.benchmark import CudaClock, Prepared, WrongResultError
from fastlora.benchmark.clock import WARMUP
from fastlora.peft import Report

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LINEAR_PROVIDERS = ["frozen linear", "eager LoRA", "PEFT", "chained addmm_", "fastlora"]


def test_the_models_come_after_the_most_telling_linears() -> None:
    command = [sys.executable, "-m", "pytest", "benches", "--collect-only", "-q", "--device", "cpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [re.sub(r".*test_(\w+)\.py::.*", r"\1", line) for line in done.stdout.splitlines() if "::" in line]
    linears = [line for line in done.stdout.splitlines() if "::test_linear[" in line]
    assert [name for name, _ in itertools.groupby(files)] == ["linears", "decoder", "linears"]
    telling = files.index("decoder")
    assert all("2048x1024x1024-r16" in line for line in linears[:telling])
    assert not any("2048x1024x1024-r16" in line for line in linears[telling:])


def test_pytest_benchmark_shows_the_times_that_were_measured_in_turn(toy_run: tuple[Path, dict, dict]) -> None:
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


def test_every_provider_and_pass_of_every_size(toy_run: tuple[Path, dict, dict]) -> None:
    folder, own, _ = toy_run
    providers: dict[str, list[str]] = {}
    for row in own["rows"]:
        providers.setdefault(f"{row['id']} {row['pass']}", []).append(row["provider"])
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    order = [
        "frozen linear",
        "eager LoRA",
        "PEFT",
        "chained addmm_",
        "compiled eager",
        "compiled PEFT",
        "fastlora",
        "compiled fastlora",
    ]
    for pass_ in ("forward", "backward", "forward + backward"):
        assert providers[f"f32-96x64x80-r8-p0.1 {pass_}"] == order
        assert providers[f"f32-96x64x80-r8-p0 {pass_}"] == LINEAR_PROVIDERS
        assert providers[f"decoder layer {pass_}"] == ["frozen layer", "PEFT", "fastlora"]
    assert providers["training step training step"] == ["PEFT", "fastlora"]
    assert list(dict.fromkeys(row["id"] for row in own["rows"])) == [
        "f32-96x64x80-r8-p0.1",
        "f32-96x64x80-r8-p0",
        "decoder layer",
        "training step",
    ]
    assert own["facts"]["repeats"] == 3
    assert set(own["ceilings"]) == {"float32"}
    assert not own["not_reached"]
    (file,) = folder.glob("*.csv")
    with file.open() as text:
        written = list(csv.DictReader(text))
    assert len(written) == len(own["rows"])
    assert {(row["torch"], row["repeats"]) for row in written} == {(torch.__version__, "3")}
    assert {(float(row["gemm_tflops"]), float(row["copy_gbps"])) for row in written} == {
        (own["ceilings"]["float32"]["gemm_tflops"], own["ceilings"]["float32"]["copy_gbps"])
    }


def make_suite(benches: dict[str, ModuleType], path: Path, **options: Any) -> Any:
    told: list[str] = []
    defaults = {"repeats": 1, "compiler": None, "budget": float("inf"), "copies": 1, "tell": told.append}
    suite = benches["suite"].Suite(path, CPU, **{**defaults, **options})
    suite.told = told
    return suite


def test_a_run_stops_with_its_budget_and_goes_on(
    benches: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.benchmark.ceilings.SIZES", {"cpu": (32, 1 << 16)})
    monkeypatch.setattr("fastlora.benchmark.results.commit", lambda: "abc")
    path, (first, second) = tmp_path / "results.json", benches["grid"].sizes("toy", CPU)
    not_measured = benches["suite"].NotMeasuredError
    suite = make_suite(benches, path)
    suite.linear(first, "fastlora")
    suite.deadline = 0.0
    suite.linear(first, "eager LoRA")
    with pytest.raises(not_measured, match="budget is spent"):
        suite.linear(second, "fastlora")
    assert any("not reached" in line for line in suite.summary())
    suite.content["rows"][0].update(p20_ms=1.0, p80_ms=1.6)
    assert any("scatter widely" in line for line in suite.summary())
    suite.close()

    suite = make_suite(benches, path, resume=True)
    with pytest.raises(not_measured, match="measured before"):
        suite.linear(first, "fastlora")
    suite.linear(second, "fastlora")
    suite.close()
    content = json.loads(path.read_text())
    assert list(dict.fromkeys(row["id"] for row in content["rows"])) == [first.id, second.id]
    assert content["not_reached"] == []

    for changed in ({"torch": "1.0"}, {"repeats": 2}):
        path.write_text(json.dumps({**content, "facts": {**content["facts"], **changed}}))
        suite = make_suite(benches, path, resume=True)
        assert "under other conditions" in suite.told[0]
        assert suite.content["rows"] == []


def test_on_a_gpu_the_models_have_the_time_that_launching_took(
    benches: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeClock(CudaClock):
        def __call__(self, name: Hashable, step: Prepared) -> float:
            step()
            launches = self.launches.setdefault(name, [])
            launches.append(1.0 if len(launches) < WARMUP else 2e-3)
            return 5e-3

    monkeypatch.setattr(benches["suite"].benchmark, "device_clock", FakeClock)
    suite = make_suite(benches, tmp_path / "results.json", repeats=3)
    seconds, row = suite.layer("fastlora", "forward", toy=True)
    assert (seconds, row["median_ms"], row["launch_ms"]) == ([5e-3] * 3, 5.0, 2.0)


@pytest.mark.parametrize(
    ("broken", "error"),
    [("chained_addmm", None), ("frozen_linear", None), ("chained_addmm", OutOfResources(300000, 232448, "shared memory"))],
    ids=["wrong", "floor", "raises"],
)
def test_a_broken_provider_fails_alone_and_a_broken_floor_fails_all(
    broken: str, error: Exception | None, benches: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.benchmark.ceilings.SIZES", {"cpu": (32, 1 << 16)})
    calls = []

    def wrong(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(x)
        if error:
            raise error
        return torch.nn.functional.linear(x, weight * 2)

    monkeypatch.setattr(f"fastlora.benchmark.baselines.{broken}", wrong)
    suite, size = make_suite(benches, tmp_path / "results.json"), benches["grid"].sizes("toy", CPU)[1]
    for name in LINEAR_PROVIDERS:
        if broken == "frozen_linear" or name == "chained addmm_":
            with pytest.raises(type(error or WrongResultError("")), match="out of resource" if error else "is wrong on"):
                suite.linear(size, name)
        else:
            suite.linear(size, name)
    assert len(calls) == 1  # judged once, for all tests of the size


def test_whatever_fails_it_is_measured_once_and_told_each_time(
    benches: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ImportError("no module named peft")

    monkeypatch.setattr(benches["decoder"], "Layer", fail)
    suite = make_suite(benches, tmp_path / "results.json")
    for provider in ("PEFT", "fastlora"):
        with pytest.raises(ImportError, match="peft"):
            suite.layer(provider, "forward", toy=True)


def test_what_does_not_fit_is_skipped(benches: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(benches["suite"].benchmark, "run", full)
    suite, size = make_suite(benches, tmp_path / "results.json"), benches["grid"].sizes("toy", CPU)[0]
    with pytest.raises(benches["suite"].NotMeasuredError, match=r"does not fit into the memory of .*too much"):
        suite.linear(size, "fastlora")


def test_a_model_that_falls_back_is_not_called_fastlora(
    benches: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = benches["decoder"]
    setting = decoder.layer_setting(CPU, toy=True)
    monkeypatch.setattr(decoder.fastlora, "accelerate", lambda model: Report((), left=(("q_proj", "planted"),)))
    with pytest.raises(WrongResultError, match="left, planted"):
        decoder.Layer(setting, CPU, copies=1)
    monkeypatch.undo()
    monkeypatch.setattr(decoder.fastlora.peft, "fallbacks", lambda model: {"planted": {"q_proj": 1}})
    with pytest.raises(WrongResultError, match="ran PEFT's forward"):
        decoder.Layer(setting, CPU, copies=1)
    monkeypatch.undo()

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        fast = accelerated(model)
        for name, parameter in fast.named_parameters():
            if "q_proj.lora_A" in name:
                parameter.data *= 1.001
        return fast

    accelerated = decoder.accelerated
    monkeypatch.setattr(decoder, "accelerated", wrong)
    with pytest.raises(WrongResultError, match="is wrong, so it is not timed"):
        decoder.Layer(setting, CPU, copies=1)


@pytest.mark.parametrize("name", ["quick", "full", "everything"])
def test_grids(name: str, benches: dict[str, ModuleType]) -> None:
    grid = benches["grid"]
    sizes = grid.sizes(name, torch.device("cuda"))
    ids = [size.id for size in sizes]
    assert len(set(ids)) == len(ids)
    assert ids[0] == "bf16-8192x4096x4096-r16-p0.1"
    assert sizes[0].compiled
    cases = {
        (s.case.shape[0], s.case.rank, s.case.dropout_p, s.case.adapters) for s in sizes if s.case.shape[1:] == (4096, 4096)
    }
    if name != "quick":
        assert len(cases) == 4 * 4 * 2 * 2 + 3 * 2
        assert {(rows, 16, p, torch.bfloat16) for rows in (1, 16, 128) for p in (0.0, 0.1)} <= cases
        for model, decoder in grid.MODELS.items():
            for linear in decoder.linears:
                for rows in grid.ROWS:
                    shape = rows, linear.in_features, linear.out_features
                    found = [s for s in sizes if s.case.shape == shape and s.case.bias == linear.bias]
                    assert any(f"{model} {', '.join(linear.names)}" in s.used_by for s in found)
    else:
        assert {(rows, 16, 0.1, torch.bfloat16) for rows in (1, 128)} <= cases
        assert len(ids) <= 1 + benches["report"].LISTED
    count = {"quick": 11, "full": 142, "everything": 19 * 64 + 6}
    assert len(ids) == count[name]
    assert all(size.case.shape[0] <= 2048 for size in grid.sizes(name, CPU))
