"""What the subcommands share: refused arguments, missing extras, figures, progress, Ctrl-C, `python -m fastlora`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora import cli
from fastlora.cli import common, parity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench -M 0", "must be an integer >= 1, got '0'"),
        ("bench --rank 1.5", "must be an integer >= 1, got '1.5'"),
        ("bench --dropout nan", "must be a number in [0, 1], got 'nan'"),
        ("bench --dtype int8", "invalid choice: 'int8'"),
        ("parity --seed x", "invalid int value: 'x'"),
        ("parity --backend cuda", "invalid choice: 'cuda'"),
        ("parity --device tpu", "must be cpu, cuda or cuda:N, got 'tpu'"),
        ("parity --device cuda:", "must be cpu, cuda or cuda:N, got 'cuda:'"),
        ("parity --device cuda:1000000", "'cuda:1000000' is not there: torch sees"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("bench", "rich"), ("parity", "rich"), ("finetune", "transformers")])
def test_a_missing_module_is_named(command, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"{module} is not installed: pip install {module}$"):
        cli.main([command])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.012345, "0.0123"), (41.19, "41.2"), (521.4, "521"), (4520.4, "4520"), (1.5e6, "1500000")]
)
def test_three_digits_without_an_exponent(value, text):
    assert common.three_digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "silent", "lines"),
    [(-1.0, False, ["1 of 2: [first]", "2 of 2: second"]), (1000.0, False, []), (-1.0, True, [])],
)
def test_where_stderr_is_no_terminal_progress_is_an_occasional_line(seconds, silent, lines, monkeypatch, capsys):
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", seconds)
    with common.progress(2, silent=silent) as step:
        step("[first]")
        step("second")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert not captured.out


@pytest.mark.parametrize("silent", [False, True])
def test_in_a_terminal_progress_is_a_bar(silent, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the pipe for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    with common.progress(2, silent=silent) as step:
        step("[first]")
        step("second, " + 9 * "very " + "long")
    captured = capsys.readouterr()
    assert [part in captured.err for part in ("━", "2/2", "second, very", "long")] == [not silent] * 3 + [False]
    assert (captured.err == "") == silent
    assert not captured.out


def test_an_interrupt_exits_with_130(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parity, "draw_cases", interrupt)
        assert cli.main(["parity"]) == 130
    monkeypatch.setattr(cli.importlib, "import_module", interrupt)  # the commands are imported when they are needed
    assert cli.main(["parity"]) == 130


@pytest.mark.parametrize(("option", "words"), [("--version", ["fastlora "]), ("--help", cli.COMMANDS)])
def test_the_package_is_the_command(option, words):
    done = subprocess.run([sys.executable, "-m", "fastlora", option], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in words)


def test_json_has_null_for_what_is_not_finite():
    assert json.loads(common.to_json({"a": math.nan, "b": [math.inf, 1.5], "c": Path("d")})) == {
        "a": None,
        "b": [None, 1.5],
        "c": "d",
    }
