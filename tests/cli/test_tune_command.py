"""`fastlora tune` as a person and a script run it: table, JSON, exit codes, refusals, interruption."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import FUSED, NAMED, refusal, stored

from fastlora import choices, cli, tune
from fastlora.benchmark.clock import Prepared
from fastlora.kernels import launch
from fastlora.kernels import target as target_module
from fastlora.kernels.forms import Choice
from fastlora.kernels.gemm import gemm_kernel

pytestmark = pytest.mark.usefixtures("empty_cache")

SMALL = ["--model", "32x48", "-M", "12", "-r", "4", "--dtype", "float32"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter under a GPU's name, and a clock for which the fused form is twice as fast as all others."""

    def measure(
        steps: Mapping[Choice, Prepared], device: torch.device, repeats: int, **options: Any
    ) -> dict[Choice, list[float]]:
        for step in steps.values():
            step()
        return {choice: [0.001 if choice == FUSED else 0.002] * repeats for choice in steps}

    monkeypatch.setattr(target_module, "INTERPRETER", NAMED)
    monkeypatch.setattr(tune, "measure", measure)


def tune_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["tune", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


# What is printed


def test_the_table(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *SMALL]) == 0
    out = capsys.readouterr().out
    for word in (
        "pass",
        "in x out",
        "dropout",
        "default",
        "chosen",
        "tile",
        "speed-up",
        "32x48",
        "forward",
        "backward",
        "auto",
    ):
        assert word in out
    assert "2.00 (2.00 to 2.00)" in out
    assert "Interpreted GPU" in out
    assert f"4 of 4 problems measured, 4 better than the default. Stored: {choices.path_of(NAMED)}\n" in out
    assert set(stored().values()) == {FUSED}
    assert {problem.rows for problem in stored()} == {16}


def test_json(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = tune_json(capsys, *SMALL, "-p", "0.5", "--repeats", "3")
    assert code == 0
    rows = report.pop("rows")
    facts = {"device": "Interpreted GPU", "file": str(choices.path_of(NAMED))}
    assert report == {**facts, "problems": 2, "measured": 2, "kept": 0}
    assert [(row["direction"], row["dropout"]) for row in rows] == [("forward", True), ("backward", True)]
    for row in rows:
        assert (row["dtype"], row["rows"], row["in_features"], row["out_features"], row["r"]) == ("float32", 16, 32, 48, 4)
        assert (row["default"], row["choice"], row["skipped"], row["left_out"]) == ("addmm", "fused", "", {})
        assert row["speedup"] == {"p20": 2.0, "median": 2.0, "p80": 2.0}
        assert row["seconds"].keys() == {"addmm", "fused", *(name for name in row["seconds"] if "warps" in name)}
        assert len(row["seconds"]) == 4
        assert row["kept"] is False


def test_a_second_run_keeps_what_the_first_measured(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *SMALL, "-p", "0.1"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert cli.main(["tune", *SMALL]) == 0  # adds the problems without dropout
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "2 of 4 problems kept from earlier runs; --again measures them anew."
    assert lines[-1].startswith("2 of 4 problems measured, 2 better than the default. Stored: ")
    assert sum("kept" in line.split() and "fused" in line.split() for line in lines[:-2]) == 2
    monkeypatch.setattr(tune, "measure", lambda *args, **options: pytest.fail("measured"))
    code, report = tune_json(capsys, *SMALL)
    assert (code, report["problems"], report["measured"], report["kept"]) == (0, 4, 0, 4)
    assert [(row["choice"], row["kept"], row["seconds"], row["speedup"]) for row in report["rows"]] == [
        ("fused", True, {}, None)
    ] * 4


def test_again(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        code, report = tune_json(capsys, *SMALL, "--again")
        assert (code, report["measured"], report["kept"]) == (0, 4, 0)
        assert not any(row["kept"] for row in report["rows"])


def test_rows_count_as_powers_of_two(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = tune_json(capsys, *SMALL[:2], "-M", "16", "9", "32", *SMALL[4:], "-p", "0")
    assert code == 0
    assert report["measured"] == len(report["rows"]) == 4
    assert {row["rows"] for row in report["rows"]} == {16, 32}


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for words in (
        "examples:",
        "fastlora tune --model ./my-llama",
        "$FASTLORA_CACHE_DIR",
        "exit code:",
        "--again",
        "not\nmeasured again",
        "default: 512 to 16384",
    ):
        assert words in out


# Exit codes


def test_a_wrong_result(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = launch.launch

    def wrong(plan: launch.Plan, *args: Any) -> None:
        right(plan, *args)
        if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"]:
            args[2].base.fill_(torch.nan)

    monkeypatch.setattr(launch, "launch", wrong)
    assert cli.main(["tune", *SMALL, "-p", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 2 problems measured, 0 better than the default" in out
    assert err.count("is left out: its result is wrong") == 6


def test_a_skipped_problem(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = tune.draw

    def full(case: Any, *args: Any) -> Any:
        if case.dropout_p:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(case, *args)

    monkeypatch.setattr(tune, "draw", full)
    assert cli.main(["tune", *SMALL]) == 1
    out, err = capsys.readouterr()
    assert "2 of 4 problems measured" in out
    assert sum("skipped" in line.split() for line in out.splitlines()) == 2
    assert err.count("with dropout is skipped: out of memory: CUDA out of memory.") == 2
    code, report = tune_json(capsys, *SMALL)
    assert (code, report["measured"], report["kept"]) == (1, 0, 2)  # what could not be measured is tried again
    assert [row["choice"] for row in report["rows"] if row["skipped"]] == [None, None]


@pytest.mark.parametrize("json_too", [False, True])
def test_an_interruption(
    json_too: bool, gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = tune.measure, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(tune, "measure", interrupted)
    assert cli.main(["tune", *SMALL, *(["--json"] if json_too else [])]) == 130
    out = capsys.readouterr().out
    if json_too:
        report = json.loads(out)
        assert (report["problems"], report["measured"], len(report["rows"])) == (4, 2, 2)
    else:
        assert f"2 of 4 problems measured, 2 better than the default. Stored: {choices.path_of(NAMED)}" in out
    assert len(stored()) == 2
    monkeypatch.setattr(tune, "measure", measure)
    code, report = tune_json(capsys, *SMALL)
    assert (code, report["measured"], report["kept"]) == (0, 2, 2)


def test_a_lost_device(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured before is shown."""
    measure, calls = tune.measure, []

    def lost(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return measure(*args)

    monkeypatch.setattr(tune, "measure", lost)
    with pytest.raises(torch.AcceleratorError):
        cli.main(["tune", *SMALL])
    assert "1 of 4 problems measured, 1 better than the default" in capsys.readouterr().out


def test_without_a_gpu(empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "fastlora tune: error: tuning needs a CUDA GPU of capability 8.0 or newer; the device is cpu\n"
    assert refusal(capsys, *SMALL) == message
    assert not empty_cache.exists()


@pytest.mark.parametrize("has_gpu", [False, True], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "4096x"], "got '4096x'"),
        (["--model", "4096,4096"], "got '4096,4096'"),
        (["--model", "0x16"], "must be a config.json or its folder, a hub id, or shapes such as 4096x4096, got '0x16'"),
        (["--model", "./nowhere"], "got './nowhere'"),
        (["--model", "nowhere/config.json"], "got 'nowhere/config.json'"),
        (["--model", "16x16", "-M", "0"], "must be an integer >= 1, got '0'"),
        (["--model", "16x16", "-r", "x"], "must be an integer >= 1, got 'x'"),
        (["--model", "16x16", "-p", "2"], "must be a number in [0, 1], got '2'"),
        (["--model", "16x16", "-p", "0.1", "0.2"], "-p takes one rate above 0, which stands for all of them, got 0.1, 0.2"),
        (["--model", "16x16", "--adapter-dtype", "float16"], "(dtype, adapter_dtype) must be one of"),
        (["--model", "16x16", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--model", "16x16", "--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    has_gpu: bool,
    empty_cache: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """They are refused before the device is."""
    if has_gpu:
        request.getfixturevalue("gpu")
    assert message in refusal(capsys, *arguments)
    assert not empty_cache.exists()


def test_where_nothing_can_be_kept(gpu: None, empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty_cache.write_text("")
    assert str(empty_cache) in refusal(capsys, *SMALL)
