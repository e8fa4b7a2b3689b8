"""The console script `fastlora`: its subcommands finetune, parity, bench and tune."""

import argparse
import importlib
from collections.abc import Sequence

from fastlora._version import __version__

COMMANDS = ("finetune", "parity", "bench", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit code: 0 fine, 1 the command's own verdict is negative, 2 wrong arguments, 130 interrupted.

    Each module in COMMANDS has `register(subparsers)`, which sets the default `func(args) -> int`.
    """
    try:
        parser = argparse.ArgumentParser(prog="fastlora", description="Fused LoRA linears: try them, check them, time them.")
        parser.add_argument("--version", action="version", version=f"fastlora {__version__}")
        subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for command in COMMANDS:
            importlib.import_module(f"{__name__}.{command}").register(subparsers)
        args = parser.parse_args(argv)
        return args.func(args)
    except KeyboardInterrupt:
        return 130
