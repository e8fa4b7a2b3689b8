"""Bytes and operations of the benchmark are those that can be counted by hand; rows, files, conditions, shapes."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from fastlora import benchmark, choices
from fastlora.benchmark import ceilings, memory, results
from fastlora.benchmark.shapes import MODELS
from fastlora.environment import environment
from fastlora.kernels.forms import Choice, Problem
from fastlora.kernels.target import Target
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)


@pytest.fixture(scope="module")
def measured() -> dict[str, benchmark.Measurement]:
    """Every provider, by name."""
    rivals = benchmark.providers_for(CASE, CPU)
    return {result.provider: result for result in benchmark.run(rivals, CASE, CPU, repeats=2, copies=2)}


def test_saved_bytes(measured: dict[str, benchmark.Measurement]) -> None:
    """The frozen linear saves nothing but W; fastlora x, S and the seed; eager the dropped x, its mask, and S."""
    saved = {name: result.saved_bytes for name, result in measured.items()}
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


def test_peak_bytes_see_inside_an_operator(measured: dict[str, benchmark.Measurement]) -> None:
    """What fastlora's own operators allocate is counted, though no dispatch mode could see it."""
    peaks = {name: result.peak_bytes for name, result in measured.items()}
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


def test_rows(measured: dict[str, benchmark.Measurement], tmp_path: Path) -> None:
    rows = results.rows_of(list(measured.values()), CASE, benchmark.Ceilings(torch.float32, 1e9, math.inf))
    assert len(rows) == 3 * len(measured)
    row = next(row for row in rows if (row["provider"], row["pass"]) == ("fastlora", "forward"))
    seconds = {name: result.quantiles("forward").median for name, result in measured.items()}
    assert row["over_frozen"] == pytest.approx(seconds["fastlora"] / seconds["frozen linear"])
    assert row["over_eager"] == pytest.approx(seconds["fastlora"] / seconds["eager LoRA"])
    assert row["roofline_percent"] == pytest.approx(100 * (2 * M * (K * N + R * (K + N)) / 1e9) / seconds["fastlora"])
    assert row["saved_bytes"] is None
    results.write_csv([row, {"other": 1}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines()[0].endswith(",other")


def test_an_interrupted_write_leaves_the_last_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    assert results.read_json(path) is None
    results.write_json({"rows": [1]}, path)
    monkeypatch.setattr(json, "dump", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write_json({"rows": [2]}, path)
    assert results.read_json(path) == {"rows": [1]}
    assert list(tmp_path.glob("*.json")) == [path]


def test_the_environment_names_the_code_and_the_machine() -> None:
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"commit", "triton", "peft", "python", "device", "threads", "date"}


def test_code_that_differs_from_the_commit_is_told_and_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    code = [tmp_path / name for name in ("fastlora/benchmark/results.py", "kernels/gemm.py", "benches/suite.py")]
    for path in code:
        path.parent.mkdir(parents=True)
        path.write_text("before\n")
    monkeypatch.setattr(results, "__file__", str(code[0]))
    assert results.commit() is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    (tmp_path / "benches" / "results").mkdir()
    (tmp_path / "benches" / "results" / "new.json").touch()
    head = results.commit()
    assert head is not None
    assert len(head) == 12
    for path in code:
        path.write_text("after\n")
        assert results.commit() == f"{head}+changes"
        path.write_text("before\n")
    (tmp_path / "benches" / "new.py").touch()
    assert results.commit() == f"{head}+changes"


def test_a_gpu_is_named_with_its_driver_and_what_was_tuned_on_it(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Target(90, 132, 232448, "Test GPU 9000")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("fastlora.kernels.target.target_of", lambda device: gpu)
    monkeypatch.setattr(results, "_driver", lambda: "580.1")
    before = environment(torch.device("cuda"))
    assert (before["device"], before["capability"], before["driver"], before["tuned"]) == (gpu.name, "sm_90", "580.1", None)
    tuned = []
    for form in ("fused", "addmm", "addmm"):
        choices.store(gpu, {Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, True): Choice(form)})
        tuned.append(environment(torch.device("cuda"))["tuned"])
    assert len({None, *tuned}) == 3
    assert tuned[1] == tuned[2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert environment(torch.device("cuda"))["tuned"] is None


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
