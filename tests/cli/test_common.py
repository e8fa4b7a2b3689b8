"""What the subcommands share: refused arguments, missing extras, figures, progress, Ctrl-C, `python -m fastlora`."""

import subprocess
import sys
from typing import Any

import pytest

from fastlora import cli
from fastlora.cli import common, parity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench -M 0", "must be an integer >= 1, got '0'"),
        ("bench --repeats -3", "must be an integer >= 1, got '-3'"),
        ("bench --rank 1.5", "must be an integer >= 1, got '1.5'"),
        ("bench --dropout 1.5", "must be a number in [0, 1], got '1.5'"),
        ("bench --dropout nan", "must be a number in [0, 1], got 'nan'"),
        ("bench --dropout much", "must be a number in [0, 1], got 'much'"),
        ("bench --dtype int8", "invalid choice: 'int8'"),
        ("parity --cases many", "must be an integer >= 1, got 'many'"),
        ("parity --seed x", "invalid int value: 'x'"),
        ("parity --dtype float8", "invalid choice: 'float8'"),
        ("parity --backend cuda", "invalid choice: 'cuda'"),
        ("parity --device tpu", "must be cpu, cuda or cuda:N, got 'tpu'"),
        ("parity --device cuda:", "must be cpu, cuda or cuda:N, got 'cuda:'"),
        ("parity --device cuda:99", "'cuda:99' is not there: torch sees"),
        ("parity --device cuda:1000000", "'cuda:1000000' is not there: torch sees"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_without_rich_it_names_the_extra(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match=r'rich is not installed: pip install "fastlora\[cli\]"'):
        cli.main([command])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.012345, "0.0123"), (41.19, "41.2"), (521.4, "521"), (4520.4, "4520"), (1.5e6, "1500000")]
)
def test_three_digits_without_an_exponent(value: float, text: str) -> None:
    assert common.three_digits(value) == text


@pytest.mark.parametrize(("seconds", "lines"), [(-1.0, ["1 of 2: first", "2 of 2: second"]), (1000.0, [])])
def test_where_stderr_is_no_terminal_progress_is_an_occasional_line(
    seconds: float, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", seconds)
    with common.progress(2) as step:
        step("first")
        step("second")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert not captured.out


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parity, "draw_cases", interrupt)
        assert cli.main(["parity"]) == 130
    monkeypatch.setattr(cli.importlib, "import_module", interrupt)  # the commands are imported when they are needed
    assert cli.main(["parity"]) == 130


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastlora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastlora ")
