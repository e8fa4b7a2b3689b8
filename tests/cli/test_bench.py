"""`fastlora bench` writes what it prints, refuses what it cannot time, and times no wrong result."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, cli
from fastlora.benchmark import ceilings, clock, providers, trial
from fastlora.cli import common

M, K, N, R = 96, 64, 80, 4
SMALL = ["bench", "-M", str(M), "-K", str(K), "-N", str(N), "-r", str(R), "--repeats", "3"]
HERE = ["frozen linear", "eager LoRA", "PEFT", "chained addmm_", "fastlora"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ceilings, and inputs that need not exceed the cache."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(trial, "copies_beyond_cache", lambda nbytes, device: 2)


def test_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PIPE_WIDTH", 80)
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", -1.0)
    folder = tmp_path / "new" / "folder"
    assert cli.main([*SMALL, "--output", str(folder)]) == 0
    captured = capsys.readouterr()
    for word in ("roofline", "TFLOP/s", "median", "p20", "p80", "MiB", f"M={M} K={K}"):
        assert word in captured.out
    table = captured.out[captured.out.rindex("─") :].splitlines()[1:]
    names = [name for pass_ in benchmark.PASSES for name in (pass_, *HERE)]
    assert [line.strip()[: len(name)] for line, name in zip(table, names, strict=False)] == names
    assert all(len(line) <= 80 for line in table[: len(names)])  # none is cut, or runs into the next line
    assert f"{len(HERE)} of {len(HERE) + clock.WARMUP + 3}: checked fastlora" in captured.err
    with (folder / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], row["provider"]) for row in rows] == [
        (name, provider) for name in benchmark.PASSES for provider in HERE
    ]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert (row["M"], row["dtype"], row["repeats"], row["torch"]) == (str(M), "float32", "3", torch.__version__)
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("slowest", "scattered"), [(1.2, False), (2.0, True)])
def test_a_disturbed_run_says_so(
    slowest: float, scattered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    visits: dict[Any, int] = {}

    def fake(name: Any, step: clock.Prepared) -> float:
        visits[name] = visits.get(name, 0) + 1
        return slowest if visits[name] > clock.WARMUP + 2 else 1.0

    monkeypatch.setattr(trial, "device_clock", lambda device: fake)
    assert cli.main([*SMALL, "--repeats", "4", "--output", str(tmp_path)]) == 0
    assert ("The times scatter widely" in capsys.readouterr().out) == scattered


def test_json_is_all_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "bfloat16", "--adapter-dtype", "float32", "--bias", "-p", "0.5", "--seed", "7"]
    assert cli.main([*SMALL, *options, "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"dtype": "bfloat16", "adapter_dtype": "float32", "bias": True, "p": 0.5, "seed": 7}
    assert {name: report["facts"][name] for name in expected} == expected
    rows = [row for row in report["rows"] if row["pass"] == "forward + backward"]
    assert [row["provider"] for row in rows] == [name for name in HERE if name != "chained addmm_"]
    frozen, eager, _, fast = rows
    assert fast["over_eager"] == pytest.approx(fast["median_ms"] / eager["median_ms"])
    assert fast["over_frozen"] == pytest.approx(fast["median_ms"] / frozen["median_ms"])
    assert fast["saved_bytes"] == 2 * M * K + 4 * M * R + 8
    assert all(Path(file).exists() for file in report["files"])


def test_a_wrong_result_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        return F.linear(x, weight) * 2

    monkeypatch.setattr(providers, "lora_linear", wrong)
    assert cli.main([*SMALL, "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "fastlora is wrong on" in captured.err
    assert "OVER" in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["-M", str(10**12)], None, f"f32 {10**12}x64x80 r=4 p=0.1 needs at least 1,654,028 GiB; cpu has "),
        (["-M", str(10**400)], None, " GiB; cpu has "),
        ([], torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        ([], RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["absurd", "more than absurd", "GPU", "CPU"],
)
def test_too_little_memory_ends_the_run_with_one_line(
    arguments: list[str],
    error: Exception | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **options: Any) -> None:
        assert error is not None, "drawn"
        raise error

    monkeypatch.setattr(trial, "draw", full)
    assert cli.main([*SMALL, *arguments, "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


def test_another_error_is_not_taken_for_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(trial, "draw", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main([*SMALL, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fastlora fused"], "fastlora fused cannot run f32 96x64x80 r=4 p=0.1 on cpu (can: frozen linear, eager"),
        (
            ["--only", "chained addmm_", "--dtype", "bfloat16", "--adapter-dtype", "float32"],
            "chained addmm_ cannot run bf16+f32",
        ),
        (["--dtype", "float32", "--adapter-dtype", "float16"], "adapter_dtype"),
        (["--output", __file__], "File exists"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_does_not_go_together(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_only_these_and_under_torch_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "compiled fastlora", "--compile", "aot_eager", "--json", "--output", str(tmp_path)]
    assert cli.main([*SMALL, *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["provider"] for row in rows[:3]] == ["frozen linear", "eager LoRA", "compiled fastlora"]
