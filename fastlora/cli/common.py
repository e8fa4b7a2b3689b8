"""What the subcommands share: argument types, and the consoles of the `cli` extra."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def positive_int(text: str) -> int:
    """An int >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def probability(text: str) -> float:
    """A number in [0, 1]; NaN is not."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return value


def device(text: str) -> torch.device:
    """A device of this machine that tensors can be put on: cpu, cuda or cuda:N."""
    try:
        named = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}") from error
    if named.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return named


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def consoles() -> "tuple[Console, Console]":
    """(stdout, stderr): results go to the first, progress and remarks to the second."""
    from rich.console import Console

    # A pipe has no width: there a table is as wide as its contents.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False), Console(stderr=True, highlight=False)


def table(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[object]], caption: str | None = None) -> "Table":
    """A table with a heading over each column; `columns` maps a heading to "left" or "right", the side its cells lean to."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for heading, side in columns.items():
        made.add_column(heading, justify="right" if side == "right" else "left")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def require(module: str, extra: str = "cli") -> Any:
    """Import an optional module; where it is missing, leave with a line that says how to get it."""
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
