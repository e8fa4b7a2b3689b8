"""What the subcommands share: argument types, tables, progress, and a clear message where an extra is missing."""

import argparse
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


def positive_int(text: str) -> int:
    """An int >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def probability(text: str) -> float:
    """A number in [0, 1]; NaN is not."""
    with suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")


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


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call after each of `total` steps: it moves a bar, or prints a line to stderr now and then."""
    from rich.progress import Progress

    _, stderr = consoles()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task, last = bar.add_task("starting", total=total), time.monotonic()

        def step(what: str) -> None:
            nonlocal last
            bar.update(task, advance=1, description=what)
            if not stderr.is_terminal and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                stderr.print(f"{bar.tasks[0].completed:.0f} of {total}: {what}", markup=False)

        yield step


def require(module: str, extra: str = "cli") -> Any:
    """Import an optional module; where it is missing, exit with a line that says how to install it."""
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SystemExit(f'fastlora: {module} is not installed: pip install "fastlora[{extra}]"') from error


def refuse(command: str, message: str) -> int:
    """Report a usage error the way argparse does; the exit code is 2."""
    print(f"fastlora {command}: error: {message}", file=sys.stderr)
    return 2
