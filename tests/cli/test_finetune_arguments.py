"""fastlora finetune's command line: what it understands, and what it refuses before anything is trained."""

import sys
from pathlib import Path

import pytest

from fastlora.cli import main
from fastlora.finetune import job
from fastlora.finetune.settings import Settings

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: got '0', expected an integer of at least 1"),
        (["--r", "0"], "--r: got '0'"),
        (["--batch-size", "-1"], "--batch-size: got '-1'"),
        (["--seq-len", "1"], "--seq-len: got '1', expected an integer of at least 2"),
        (["--seq-len", "100000"], "are too few for seq_len=100000"),
        (["--dropout", "1"], r"--dropout: got '1.0', expected a rate in [0, 1)"),
        (["--dropout", "nan"], "--dropout: got 'nan'"),
        (["--lr", "inf"], "--lr: got 'inf', expected a finite number above 0"),
        (["--alpha", "0"], "--alpha: got '0.0'"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--threads", "0"], "--threads: got '0'"),
        (["--hidden-size", "33"], "--hidden-size: got '33', expected a multiple of 32"),
        (["--adapter-dtype", "bfloat16"], "--adapter-dtype: got 'bfloat16', expected float32"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--device", "cuda:99"], "is not there"),
        (["--device", "nonsense"], "must be cpu, cuda or cuda:N"),
        (["--target-modules", "q_prj"], "near names: q_proj"),
        (["--target-modules", "(q"], "is not a regular expression"),
        (["--model", "nowhere"], "'nowhere' is not a Hugging Face model folder"),
        (["--text", "nowhere.txt"], "'nowhere.txt' is neither a file nor a folder"),
        (["--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("training was started"))
    try:
        code = main(["finetune", *options])
    except SystemExit as leaving:  # argparse's own checks
        code = leaving.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_text_and_output_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "file").write_text("")
    transformers.LlamaConfig(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    for options, message in (
        (["--text", str(tmp_path / "empty")], "holds no .md, .rst, .txt file"),
        (["--text", str(tmp_path / "binary.txt")], "is not UTF-8 text"),
        (["--text", str(tmp_path / "short.txt")], "too few"),
        (["--output", str(tmp_path / "file")], "is a file"),
        (["--model", str(tmp_path / "model"), "--seq-len", "4096"], "expected at most the 2048 positions"),
    ):
        assert main(["finetune", *options]) == 2
        assert message in capsys.readouterr().err


def test_targets_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def stop(settings: Settings) -> None:
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(job, "prepare", stop)
    for values in (["all-linear"], ["q_proj"], ["q_proj", "k_proj"], [r".*\.(q|k)_proj"]):
        main(["finetune", "--target-modules", *values])
    assert [settings.target_modules for settings in seen] == [
        "all-linear", ("q_proj",), ("q_proj", "k_proj"), r".*\.(q|k)_proj",
    ]  # fmt: skip


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises((SystemExit, ModuleNotFoundError)) as leaving:
        main(["finetune"])
    assert "matplotlib" in str(leaving.value)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("finetune", "parity", "bench"))
