"""`fastlora bench` writes what it prints, refuses what it cannot time, and times no wrong result."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlora import benchmark, cli
from fastlora.benchmark import ceilings, clock, providers, trial
from fastlora.cli import common

M, K, N, R = 96, 64, 80, 4
HERE = ["frozen linear", "eager LoRA", "PEFT", "chained addmm_", "fastlora"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(*arguments) -> exit code, for a small size; ceilings are small, and inputs need not exceed the cache."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(trial, "copies_beyond_cache", lambda nbytes, device: 2)
    small = ["bench", "-M", str(M), "-K", str(K), "-N", str(N), "-r", str(R), "--repeats", "3"]
    return lambda *arguments: cli.main([*small, "--output", str(tmp_path / "new/folder"), *arguments])


def test_the_table_and_the_files(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "PIPE_WIDTH", 80)
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", -1.0)
    assert bench() == 0
    captured = capsys.readouterr()
    for word in ("roofline", "TFLOP/s", "median", "p20", "p80", "MiB", f"M={M} K={K}"):
        assert word in captured.out
    table = captured.out[captured.out.rindex("─") :].splitlines()[1:]
    names = [name for pass_ in benchmark.PASSES for name in (pass_, *HERE)]
    assert [line.strip()[: len(name)] for line, name in zip(table, names, strict=False)] == names
    assert all(len(line) <= 80 for line in table[: len(names)])  # none is cut, or runs into the next line
    assert f"{len(HERE)} of {len(HERE) + clock.WARMUP + 3}: checked fastlora" in captured.err
    with (tmp_path / "new/folder/bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], row["provider"]) for row in rows] == [(pass_, name) for pass_ in benchmark.PASSES for name in HERE]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert (row["M"], row["dtype"], row["repeats"], row["torch"]) == (str(M), "float32", "3", torch.__version__)
    assert (tmp_path / "new/folder/bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("slowest", "scattered"), [(1.2, False), (2.0, True)])
def test_a_disturbed_run_says_so(slowest, scattered, bench, monkeypatch, capsys):
    visits = {}

    def fake(name, step):
        visits[name] = visits.get(name, 0) + 1
        return slowest if visits[name] > clock.WARMUP + 2 else 1.0

    monkeypatch.setattr(trial, "device_clock", lambda device: fake)
    assert bench("--repeats", "4") == 0
    assert ("The times scatter widely" in capsys.readouterr().out) == scattered


def test_json_is_all_of_stdout(bench, capsys):
    assert bench("--dtype", "bfloat16", "--adapter-dtype", "float32", "--bias", "-p", "0.5", "--seed", "7", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"dtype": "bfloat16", "adapter_dtype": "float32", "bias": True, "p": 0.5, "seed": 7}
    assert report["facts"].items() >= expected.items()
    rows = [row for row in report["rows"] if row["pass"] == "forward + backward"]
    assert [row["provider"] for row in rows] == [name for name in HERE if name != "chained addmm_"]
    frozen, eager, _, fast = rows
    assert fast["over_eager"] == pytest.approx(fast["median_ms"] / eager["median_ms"])
    assert fast["over_frozen"] == pytest.approx(fast["median_ms"] / frozen["median_ms"])
    assert fast["saved_bytes"] == 2 * M * K + 4 * M * R + M * -(-K // 8)
    assert all(Path(file).exists() for file in report["files"])


def test_only_these_and_under_torch_compile(bench, capsys):
    assert bench("--only", "compiled fastlora", "--compile", "aot_eager", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["provider"] for row in rows[:3]] == ["frozen linear", "eager LoRA", "compiled fastlora"]


def test_a_wrong_result_ends_the_run(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(providers, "lora_linear", lambda x, weight, *rest, **options: F.linear(x, weight) * 2)
    assert bench() == 1
    out, err = capsys.readouterr()
    assert "fastlora is wrong on" in err
    assert "OVER" in err
    assert not out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (10**12, None, f"f32 {10**12}x64x80 r=4 p=0.1 needs at least 1,654,028 GiB; cpu has "),
        (10**400, None, " GiB; cpu has "),
        (M, torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (M, RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (M, RuntimeError("a defect"), None),
    ],
    ids=["absurd", "more than absurd", "GPU", "CPU", "another error"],
)
def test_too_little_memory_ends_the_run_with_one_line(rows, error, message, bench, monkeypatch, capsys):
    def full(*args, **options):
        raise error or AssertionError("drawn")

    monkeypatch.setattr(trial, "draw", full)
    if message is None:
        with pytest.raises(RuntimeError, match="a defect"):
            bench()
        return
    assert bench("-M", str(rows)) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out


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
    ids=["needs a GPU", "mixed dtypes", "dtypes", "output"],
)
def test_what_does_not_go_together(arguments, message, bench, capsys):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err
