"""What the subcommands share: argument types, tables, progress, and a clear message where an extra is missing."""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIPE_WIDTH = 160  # columns; a pipe has no width of its own
SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr is not a terminal


def number(kind: type, expected: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` for which `holds` is true.  `expected` describes these numbers; NaN is never one."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if holds(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


def at_least(least: int) -> Callable[[str], Any]:
    """An argparse type: an integer >= `least`."""
    return number(int, f"an integer >= {least}", lambda value: value >= least)


positive_int = at_least(1)
positive = number(float, "a finite number > 0", lambda value: 0 < value < math.inf)
probability = number(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)


def device(text: str) -> torch.device:
    """A device of this machine: cpu, cuda or cuda:N."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(text)


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def consoles() -> "tuple[Console, Console]":
    """(stdout, stderr): results go to the first, progress and remarks to the second."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False), Console(stderr=True, highlight=False)


def table(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[object]], caption: str | None = None) -> "Table":
    """A table with a heading over each column; `columns` maps a heading to "left" or "right", the side its cells lean to."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    made.title_justify = made.caption_justify = "left"
    for heading, side in columns.items():
        made.add_column(heading, justify="right" if side == "right" else "left")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def three_digits(value: float) -> str:
    """`value` >= 0 to three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def to_json(value: object) -> str:
    """Indented JSON; NaN and infinity become null, because JSON has neither, and what JSON does not know becomes its str()."""
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
    return json.dumps(finite, indent=2)


@contextmanager
def progress(total: int, silent: bool = False) -> Iterator[Callable[[str], None]]:
    """Yields what to call after each of `total` steps: it moves a bar, or prints a line to stderr now and then.

    With `silent` nothing is shown.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    _, stderr = consoles()
    stderr.quiet = silent
    rest = Column(ratio=1, no_wrap=True)  # only the text is cut in a narrow terminal
    text = TextColumn("{task.description}", markup=False, table_column=rest)
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), text
    with Progress(*columns, console=stderr, expand=True, transient=True, disable=not stderr.is_terminal) as bar:
        task, last = bar.add_task("starting", total=total), time.monotonic()

        def step(what: str) -> None:
            nonlocal last
            bar.update(task, advance=1, description=what)
            if not stderr.is_terminal and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                stderr.print(f"{bar.tasks[0].completed:.0f} of {total}: {what}", markup=False, soft_wrap=True)

        yield step


def require(module: str) -> Any:
    """Import an optional module; where it is missing, exit with a line that says how to install it."""
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SystemExit(f"fastlora: {module} is not installed: pip install {module}") from error


def refuse(command: str, message: str) -> int:
    """Report a usage error the way argparse does; the exit code is 2."""
    print(f"fastlora {command}: error: {message}", file=sys.stderr)
    return 2
