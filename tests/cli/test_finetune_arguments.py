"""fastlora finetune's command line: what it understands, and what it refuses before anything is trained."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from fastlora.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from fastlora.finetune import train  # noqa: E402  # needs transformers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps: got '0', expected an integer of at least 1"),
        ("--steps many", "--steps: got 'many', expected an integer of at least 1"),
        ("--r 0", "--r/--rank: got '0'"),
        ("--batch-size -1", "--batch-size: got '-1'"),
        ("--seq-len 1", "--seq-len: got '1', expected an integer of at least 2"),
        ("--seq-len 100000", "are too few for seq_len=100000"),
        ("--dropout 1", "--dropout: got '1', expected a rate in [0, 1)"),
        ("--dropout nan", "--dropout: got 'nan'"),
        ("--lr inf", "--lr: got 'inf', expected a finite number above 0"),
        ("--pretrain-lr 0", "--pretrain-lr: got '0'"),
        ("--pretrain-steps -1", "--pretrain-steps: got '-1', expected an integer of at least 0"),
        ("--alpha 0", "--alpha: got '0'"),
        ("--seed -1", "--seed: got '-1'"),
        ("--seed 9223372036854775808", "expected an integer in [0, 2**63)"),
        ("--threads 0", "--threads: must be an integer >= 1, got '0'"),
        ("--layers 0", "--layers: got '0'"),
        ("--hidden-size 33", "--hidden-size: got '33', expected a multiple of 32"),
        ("--adapter-dtype bfloat16", "--adapter-dtype: got 'bfloat16', expected float32"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--device cuda:99", "is not there"),
        ("--device nonsense", "must be cpu, cuda or cuda:N"),
        ("--target-modules q_prj", "near names: q_proj"),
        ("--target-modules (q", "is not a regular expression"),
        ("--model nowhere", "--model: 'nowhere' is not a Hugging Face model folder"),
        ("--model model --seq-len 4096", "--seq-len: got 4096, expected at most the 2048 positions"),
        ("--model small", "its vocabulary of 100 is too small for bytes"),
        ("--text nowhere.txt", "--text: 'nowhere.txt' cannot be read"),
        ("--text empty", "holds no .md, .rst, .txt file"),
        ("--text binary.txt", "--text: 'binary.txt' cannot be read, expected UTF-8 text"),
        ("--text short.txt", "too few"),
        ("--output file", "--output: 'file' is a file"),
    ],
)
def test_wrong_arguments(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("training was started"))
    Path("empty").mkdir()
    for name, content in (("binary.txt", b"\xff\xfe\x00"), ("short.txt", b"too short"), ("file", b"")):
        Path(name).write_bytes(content)
    transformers.LlamaConfig(max_position_embeddings=2048).save_pretrained("model")
    transformers.LlamaConfig(vocab_size=100).save_pretrained("small")
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(["finetune", *options.split()])
    except SystemExit as leaving:  # argparse's own checks
        code = leaving.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_backend_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastlora.cli.finetune.available_backends", lambda device: ("torch",))
    assert main(["finetune", "--backend", "triton", "--device", "cpu"]) == 2
    assert "--backend: got 'triton', expected torch on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "k_proj"], ("q_proj", "k_proj")),
        ([r".*\.(q|k)_proj"], r".*\.(q|k)_proj"),
    ],
)
def test_targets_from_the_command_line(monkeypatch: pytest.MonkeyPatch, values: list[str], targets: object) -> None:
    def stop(args: Namespace) -> None:
        assert args.target_modules == targets
        raise ValueError("enough")

    monkeypatch.setattr(train, "prepare", stop)
    assert main(["finetune", "--target-modules", *values]) == 2


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises((SystemExit, ModuleNotFoundError), match="matplotlib"):
        main(["finetune"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("finetune", "parity", "bench"))
