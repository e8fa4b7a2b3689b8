"""`fastlora tune` as a person and a script run it: models, table, JSON, exit codes, refusals, interruption."""

import contextlib
import json
from unittest import mock

import pytest
import torch
import transformers
from tuned import NAMED

from fastlora import cli, dispatch, tune
from fastlora.benchmark import trial
from fastlora.cli.tune import shapes_of

pytestmark = pytest.mark.usefixtures("empty_cache")

SMALL = ["--model", "32x48", "-M", "12", "-r", "4", "--dtype", "float32"]
LLAMA = transformers.LlamaConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


@pytest.fixture
def gpu(target, monkeypatch):
    """The interpreter under a GPU's name; every result is right, and "fused" is twice as fast as all others."""

    def measure(steps, device, repeats):
        return {choice: [0.001 if choice == "fused" else 0.002] * repeats for choice in steps}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(trial, "verify", lambda *args: [])


@pytest.fixture
def tune_json(capsys):
    """tune_json(*arguments) -> (exit code, report), for SMALL."""
    return lambda *arguments: (cli.main(["tune", *SMALL, "--json", *arguments]), json.loads(capsys.readouterr().out))


@pytest.fixture
def refusal(capsys, empty_cache):
    """refusal(*arguments) -> what the command says as it refuses, having touched nothing."""

    def refusal(*arguments):
        try:
            code = cli.main(["tune", *arguments])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert not empty_cache.is_dir()
        return err

    return refusal


# What --model takes


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (LLAMA, [(64, 64), (64, 32), (64, 96), (96, 64)]),
        (transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2), [(32, 96), (32, 32), (32, 128), (128, 32)]),
        (
            transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2),
            [(32, 32), (32, 48), (48, 32)],
        ),
    ],
    ids=["Llama", "GPT-2", "ViT"],
)
def test_the_shapes_of_a_configuration(config, shapes, tmp_path):
    """(in, out) of every linear once, but not of the output head.  A Conv1D stores its weight as (in, out)."""
    config.save_pretrained(tmp_path)
    assert shapes_of(str(tmp_path)) == shapes_of(str(tmp_path / "config.json")) == shapes


def test_a_model_is_tuned(tmp_path, target, monkeypatch):
    """Every shape, row count, rank, direction, with and without dropout: once, with the options given."""
    asked = []
    monkeypatch.setattr(tune, "tune", lambda problems, device, **options: asked.append((problems, device, options)) or ())
    LLAMA.save_pretrained(tmp_path)
    arguments = ["-r", "8", "32", "-p", "0.05", "0", "--dtype", "float16", "--adapter-dtype", "float32", "--repeats", "7"]
    assert cli.main(["tune", "--model", str(tmp_path), *arguments]) == 0
    ((problems, device, options),) = asked
    assert len(problems) == len(set(problems)) == 4 * 6 * 2 * 2 * 2
    assert {problem.rows for problem in problems} == {512, 1024, 2048, 4096, 8192, 16384}
    assert ({problem.r for problem in problems}, {problem.dtype for problem in problems}) == ({8, 32}, {torch.float16})
    assert (device, options["adapter_dtype"]) == (torch.device("cpu"), torch.float32)
    assert (options["dropout_p"], options["repeats"]) == (0.05, 7)
    assert shapes_of("64x32,32x64,64x32") == [(64, 32), (32, 64)]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2"])
def test_a_hub_id_goes_to_the_hub(name, refusal, monkeypatch):
    offline = mock.Mock(side_effect=OSError("We couldn't connect to 'https://huggingface.co'"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert "couldn't connect" in refusal("--model", name)
    offline.assert_called_once_with(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid JSON file"), ('{"model_type": "nope"}', "does not recognize"), ("{}", "model_type"), (None, "config")],
)
def test_a_bad_configuration(text, message, tmp_path, refusal):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert message in refusal("--model", str(tmp_path))


# What is printed


def test_the_table(gpu, capsys):
    assert cli.main(["tune", *SMALL]) == 0
    out = capsys.readouterr().out
    for word in ("pass", "in x out", "dropout", "default", "chosen", "speed-up", "32x48", "forward", "backward", "fused"):
        assert word in out
    assert "2.00 (2.00 to 2.00)" in out
    assert "Interpreted GPU" in out
    assert f"4 of 4 problems measured, 4 better than the default. Stored: {dispatch.path_of(NAMED)}\n" in out
    assert dispatch.stored(NAMED)["backward float32 16 x 32 -> 48 r=4"] == "fused"


def test_json(gpu, tune_json):
    code, report = tune_json("-p", "0.5", "--repeats", "3")
    rows = report.pop("rows")
    facts = {"device": "Interpreted GPU", "file": str(dispatch.path_of(NAMED))}
    assert (code, report) == (0, {**facts, "problems": 2, "measured": 2, "kept": 0})
    assert [(row["direction"], row["dropout"]) for row in rows] == [("forward", True), ("backward", True)]
    expected = {"dtype": "float32", "rows": 16, "in_features": 32, "out_features": 48, "r": 4, "default": "addmm"}
    expected |= {"choice": "fused", "skipped": "", "kept": False, "speedup": {"p20": 2.0, "median": 2.0, "p80": 2.0}}
    for row in rows:
        assert {name: row[name] for name in expected} == expected
        assert row["left_out"] == {}
        assert {"addmm", "fused"} < row["seconds"].keys()


def test_a_second_run_keeps_what_the_first_measured(gpu, tune_json, capsys):
    assert cli.main(["tune", *SMALL, "-p", "0.1"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert cli.main(["tune", *SMALL]) == 0  # adds the problems without dropout
    *table, kept, measured = capsys.readouterr().out.splitlines()
    assert kept == "2 of 4 problems kept from earlier runs; --again measures them anew."
    assert measured.startswith("2 of 4 problems measured, 2 better than the default. Stored: ")
    assert sum("kept" in line.split() and "fused" in line.split() for line in table) == 2
    for arguments, kept in (((), 4), (("--again",), 0)):
        code, report = tune_json(*arguments)
        assert (code, report["problems"], report["measured"], report["kept"]) == (0, 4, 4 - kept, kept)
        assert all((row["choice"], row["kept"]) == ("fused", kept == 4) for row in report["rows"])


# Exit codes


def test_a_wrong_result_and_a_skipped_problem(gpu, tune_json, monkeypatch, capsys):
    right = trial.draw

    def wrong(provider, *args):
        if provider.name == "fused":
            raise trial.WrongResultError("OVER")

    def full(case, *args):
        if case.dropout_p:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(case, *args)

    monkeypatch.setattr(trial, "verify", wrong)
    assert cli.main(["tune", *SMALL, "-p", "0"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 2 problems measured, 0 better than the default" in out
    assert err.count("fused is left out: its result is wrong") == 2
    monkeypatch.setattr(trial, "draw", full)
    assert cli.main(["tune", *SMALL]) == 1
    out, err = capsys.readouterr()
    assert sum("skipped" in line.split() for line in out.splitlines()) == 2
    assert err.count("with dropout is skipped: out of memory: CUDA out of memory.") == 2
    code, report = tune_json()
    assert (code, report["measured"], report["kept"]) == (1, 0, 2)  # a skipped problem is tried again


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.AcceleratorError("an illegal memory access")])
def test_an_interruption(error, gpu, monkeypatch, capsys):
    """What was measured before is shown and kept."""
    results = iter([{"fused": [0.001], "addmm": [0.002]}] * 2)

    def interrupted(steps, device, repeats):
        for times in results:
            return times
        raise error

    monkeypatch.setattr(tune, "measure", interrupted)
    with contextlib.suppress(torch.AcceleratorError):
        assert cli.main(["tune", *SMALL]) == 130
    assert "2 of 4 problems measured, 2 better than the default. Stored: " in capsys.readouterr().out
    assert len(dispatch.stored(NAMED)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "4096x"], "got '4096x'"),
        (["--model", "0x16"], "must be a config.json or its folder, a hub id, or shapes such as 4096x4096, got '0x16'"),
        (["--model", "./nowhere"], "got './nowhere'"),
        (["--model", "16x16", "-p", "0.1", "0.2"], "-p takes one rate above 0, which stands for all of them, got 0.1, 0.2"),
        (["--model", "16x16", "--adapter-dtype", "float16"], "(dtype, adapter_dtype) must be one of"),
        (SMALL, "fastlora tune: error: tuning needs a CUDA GPU of capability 8.0 or newer; the device is cpu\n"),
    ],
)
def test_bad_arguments_are_refused_before_the_device(arguments, message, refusal):
    assert message in refusal(*arguments)


def test_a_cache_that_cannot_be_written(empty_cache, gpu, refusal):
    empty_cache.write_text("")
    assert str(empty_cache) in refusal(*SMALL)
