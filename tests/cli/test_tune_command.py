"""`fastlora tune` as a person and a script run it: models, table, JSON, exit codes, refusals, interruption."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tuned import NAMED, refusal

from fastlora import cli, dispatch, tune
from fastlora.benchmark.clock import Step
from fastlora.cli.tune import shapes_of
from fastlora.kernels import target as target_module

pytestmark = pytest.mark.usefixtures("empty_cache")

SMALL = ["--model", "32x48", "-M", "12", "-r", "4", "--dtype", "float32"]
LLAMA = transformers.LlamaConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter under a GPU's name, and a clock for which "fused" is twice as fast as all others."""

    def measure(steps: Mapping[str, Step], device: torch.device, repeats: int) -> dict[str, list[float]]:
        return {choice: [0.001 if choice == "fused" else 0.002] * repeats for choice in steps}

    monkeypatch.setattr(target_module, "INTERPRETER", NAMED)
    monkeypatch.setattr(tune, "measure", measure)


def tune_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["tune", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


# What --model takes


def test_shapes_and_configurations(tmp_path: Path) -> None:
    """(in, out) of every linear once; not of the output head.  A Conv1D stores its weight the other way round."""
    assert shapes_of("64x32,32x64,64x32") == [(64, 32), (32, 64)]
    LLAMA.save_pretrained(tmp_path)
    assert shapes_of(str(tmp_path)) == shapes_of(str(tmp_path / "config.json")) == [(64, 64), (64, 32), (64, 96), (96, 64)]
    transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    assert shapes_of(str(tmp_path)) == [(32, 96), (32, 32), (32, 128), (128, 32)]
    vit = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vit.save_pretrained(tmp_path)
    assert shapes_of(str(tmp_path)) == [(32, 32), (32, 48), (48, 32)]


def test_a_model_is_tuned(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, row count, rank, direction, with and without dropout: once, with the options given."""
    asked: list[Any] = []
    monkeypatch.setattr(tune, "tune", lambda problems, device, **options: asked.append((problems, device, options)))
    LLAMA.save_pretrained(tmp_path)
    arguments = ["-r", "8", "32", "-p", "0.05", "0", "--dtype", "float16", "--adapter-dtype", "float32", "--repeats", "7"]
    assert cli.main(["tune", "--model", str(tmp_path), *arguments]) == 0
    ((problems, device, options),) = asked
    assert len(problems) == len(set(problems)) == 4 * 6 * 2 * 2 * 2
    assert {problem.rows for problem in problems} == {512, 1024, 2048, 4096, 8192, 16384}
    assert ({problem.r for problem in problems}, {problem.dtype for problem in problems}) == ({8, 32}, {torch.float16})
    assert (device, options["adapter_dtype"]) == (torch.device("cpu"), torch.float32)
    assert (options["dropout_p"], options["repeats"]) == (0.05, 7)


def test_a_hub_id_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def offline(model: str) -> None:
        asked.append(model)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    for model in ("Qwen/Qwen3-8B", "gpt2"):
        assert "couldn't connect" in refusal(capsys, "--model", model)
    assert asked == ["Qwen/Qwen3-8B", "gpt2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid JSON file"), ('{"model_type": "nope"}', "does not recognize"), ("{}", "model_type"), (None, "config")],
)
def test_a_bad_configuration(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert message in refusal(capsys, "--model", str(tmp_path))


# What is printed


def test_the_table(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *SMALL]) == 0
    out = capsys.readouterr().out
    for word in ("pass", "in x out", "dropout", "default", "chosen", "speed-up", "32x48", "forward", "backward", "fused"):
        assert word in out
    assert "2.00 (2.00 to 2.00)" in out
    assert "Interpreted GPU" in out
    assert f"4 of 4 problems measured, 4 better than the default. Stored: {dispatch.path_of(NAMED)}\n" in out
    assert dispatch.stored(NAMED)["backward float32 16 x 32 -> 48 r=4"] == "fused"


def test_json(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = tune_json(capsys, *SMALL, "-p", "0.5", "--repeats", "3")
    rows = report.pop("rows")
    facts = {"device": "Interpreted GPU", "file": str(dispatch.path_of(NAMED))}
    assert (code, report) == (0, {**facts, "problems": 2, "measured": 2, "kept": 0})
    assert [(row["direction"], row["dropout"]) for row in rows] == [("forward", True), ("backward", True)]
    for row in rows:
        assert (row["dtype"], row["rows"], row["in_features"], row["out_features"], row["r"]) == ("float32", 16, 32, 48, 4)
        assert (row["default"], row["choice"], row["skipped"], row["left_out"]) == ("addmm", "fused", "", {})
        assert row["speedup"] == {"p20": 2.0, "median": 2.0, "p80": 2.0}
        assert {"addmm", "fused"} < row["seconds"].keys()
        assert row["kept"] is False


def test_a_second_run_keeps_what_the_first_measured(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *SMALL, "-p", "0.1"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert cli.main(["tune", *SMALL]) == 0  # adds the problems without dropout
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "2 of 4 problems kept from earlier runs; --again measures them anew."
    assert lines[-1].startswith("2 of 4 problems measured, 2 better than the default. Stored: ")
    assert sum("kept" in line.split() and "fused" in line.split() for line in lines[:-2]) == 2
    for again, kept in ((False, 4), (True, 0)):
        code, report = tune_json(capsys, *SMALL, *["--again"] * again)
        assert (code, report["problems"], report["measured"], report["kept"]) == (0, 4, 4 - kept, kept)
        assert all((row["choice"], row["kept"]) == ("fused", not again) for row in report["rows"])


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for words in ("examples:", "fastlora tune --model ./my-llama", "$FASTLORA_CACHE_DIR", "exit code:", "512 to 16384"):
        assert words in out


# Exit codes


def test_a_wrong_result(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(judge: Any, provider: Any) -> None:
        if provider.name.startswith("fused"):
            raise tune.WrongResultError("OVER")

    monkeypatch.setattr(tune.Judge, "verify", wrong)
    assert cli.main(["tune", *SMALL, "-p", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 2 problems measured, 0 better than the default" in out
    assert err.count("is left out: its result is wrong") == 8


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
    assert (code, report["measured"], report["kept"]) == (1, 0, 2)  # a skipped problem is tried again


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.AcceleratorError("an illegal memory access")])
def test_an_interruption(error: BaseException, json_too: bool, gpu: None, monkeypatch: Any, capsys: Any) -> None:
    """What was measured before is shown and kept."""
    measure, calls = tune.measure, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return measure(*args)

    monkeypatch.setattr(tune, "measure", interrupted)
    arguments = ["tune", *SMALL, *(["--json"] if json_too else [])]
    if isinstance(error, KeyboardInterrupt):
        assert cli.main(arguments) == 130
    else:
        with pytest.raises(torch.AcceleratorError):
            cli.main(arguments)
    out = capsys.readouterr().out
    if json_too:
        report = json.loads(out)
        assert (report["problems"], report["measured"], len(report["rows"])) == (4, 2, 2)
    else:
        assert f"2 of 4 problems measured, 2 better than the default. Stored: {dispatch.path_of(NAMED)}" in out
    assert len(dispatch.stored(NAMED)) == 2


@pytest.mark.parametrize("has_gpu", [False, True], ids=["no GPU", "GPU"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "4096x"], "got '4096x'"),
        (["--model", "0x16"], "must be a config.json or its folder, a hub id, or shapes such as 4096x4096, got '0x16'"),
        (["--model", "./nowhere"], "got './nowhere'"),
        (["--model", "nowhere/config.json"], "got 'nowhere/config.json'"),
        (["--model", "16x16", "-M", "0"], "must be an integer >= 1, got '0'"),
        (["--model", "16x16", "-p", "2"], "must be a number in [0, 1], got '2'"),
        (["--model", "16x16", "-p", "0.1", "0.2"], "-p takes one rate above 0, which stands for all of them, got 0.1, 0.2"),
        (["--model", "16x16", "--adapter-dtype", "float16"], "(dtype, adapter_dtype) must be one of"),
        (["--model", "16x16", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--model", "16x16", "--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, has_gpu: bool, empty_cache: Path, capsys: Any, request: pytest.FixtureRequest
) -> None:
    """They are refused before the device is."""
    if has_gpu:
        request.getfixturevalue("gpu")
    assert message in refusal(capsys, *arguments)
    assert not empty_cache.exists()


def test_without_a_gpu_or_a_cache(empty_cache: Path, capsys: Any, request: pytest.FixtureRequest) -> None:
    message = "fastlora tune: error: tuning needs a CUDA GPU of capability 8.0 or newer; the device is cpu\n"
    assert refusal(capsys, *SMALL) == message
    assert not empty_cache.exists()
    request.getfixturevalue("gpu")
    empty_cache.write_text("")
    assert str(empty_cache) in refusal(capsys, *SMALL)
