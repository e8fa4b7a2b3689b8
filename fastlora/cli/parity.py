"""`fastlora parity`: forward and every gradient against float64, on every backend that runs here, in one table."""

import argparse
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastlora import functional, oracle
from fastlora.cli import common

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16+float32": (torch.float16, torch.float32),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
}
#: (M, K, N): tiny, one row, odd, one over a tile, exact tiles, wide, larger.
SHAPES = ((3, 6, 9), (1, 64, 48), (7, 33, 65), (65, 129, 31), (64, 128, 64), (40, 24, 200), (300, 320, 256))
RANKS = (1, 3, 8, 16, 33, 64, 130)
DROPOUTS = (0.0, 0.1, 0.5, 1.0)
BIAS = (True, False)
#: The Triton backend in each of its forms, and the torch backend.
BACKENDS = ("fused", "addmm", "torch")

INTERPRETER_HINT = "Triton's interpreter runs its kernels on a CPU: TRITON_INTERPRET=1 fastlora parity"
DESCRIPTION = """\
Compute y, dx, dA, dB and dbias with fastlora.lora_linear and hold each against float64, from the same inputs and the same
dropout mask. An error passes when it is at most twice that of eager LoRA in the same dtypes, or below the dtype's floor.
The cases are drawn so that every dtype, shape, rank, dropout rate and bias setting comes up equally often."""


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    parser = subparsers.add_parser(
        "parity",
        help="check forward and all gradients against float64",
        description=DESCRIPTION,
        epilog=f"Exit code: 0 every error within its bound, 1 one over it, 2 wrong arguments. {INTERPRETER_HINT}",
    )
    parser.add_argument("--cases", type=common.positive_int, default=40, metavar="N", help="cases to draw (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases, their inputs and their masks (default: 0)")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="base dtype, or base+adapters; may be repeated (default: all)"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: all that run on the device")
    parser.add_argument(
        "--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check the cases and print the verdicts; the exit code."""
    common.require("rich")
    available = functional.available_backends(args.device)
    if args.backend and args.backend not in available:
        hint = f" {INTERPRETER_HINT} --backend {args.backend}" if args.device.type == "cpu" else ""
        return common.refuse("parity", f"the {args.backend} backend cannot run on {args.device}.{hint}")
    backends = [args.backend] if args.backend else [name for name in available if name in BACKENDS]
    results = _check(draw_cases(args.dtype or list(DTYPES), args.cases, args.seed), backends, args.device)
    missing = not args.backend and "fused" not in available
    if args.json:
        print(json.dumps(_report(results, args, backends), indent=2))
    else:
        _print(results, backends, args.device, missing)
    return 0 if all(row.passed for _, row in results) else 1


def draw_cases(dtypes: Sequence[str], count: int, seed: int) -> list[oracle.Case]:
    """`count` cases in which the values of each axis come up equally often, to within one."""
    generator = random.Random(seed)

    def axis(values: Sequence[Any]) -> list[Any]:
        column: list[Any] = []
        while len(column) < count:
            column += generator.sample(values, len(values))
        return column[:count]

    columns = [axis(values) for values in (dtypes, SHAPES, RANKS, DROPOUTS, BIAS)]
    drawn = sorted(zip(*columns, strict=True), key=lambda values: list(DTYPES).index(values[0]))
    return [
        oracle.Case(shape, rank, *DTYPES[name], bias=bias, dropout_p=p, seed=seed + index)
        for index, (name, shape, rank, p, bias) in enumerate(drawn)
    ]


def _check(cases: Sequence[oracle.Case], backends: Sequence[str], device: torch.device) -> list[tuple[str, oracle.Row]]:
    from rich.progress import Progress

    _, stderr = common.consoles()
    results = []
    with warnings.catch_warnings(), Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        warnings.filterwarnings("ignore", message="r=.* is above min")  # such ranks are among those to check
        task = progress.add_task("checking", total=len(cases) * len(backends))
        for case in cases:
            for backend in backends:
                progress.update(task, description=f"{backend}: {case}")
                try:
                    results += [(backend, row) for row in oracle.check(case, backend=backend, device=device)]
                except Exception as error:
                    error.add_note(f"while checking {case}, seed {case.seed}, on the {backend} backend")
                    raise
                progress.advance(task)
    return results


def _print(results: Sequence[tuple[str, oracle.Row]], backends: Sequence[str], device: torch.device, missing: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"relative error against float64 on {device}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    several = len(backends) > 1
    for heading in ("case", *(["backend"] if several else []), "output"):
        table.add_column(heading)
    for heading in ("fastlora", "eager", "bound"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    previous_case, previous_backend = None, ""
    for backend, row in results:
        new_case = row.case != previous_case
        new_backend = new_case or backend != previous_backend
        if new_case and previous_case is not None:
            table.add_row()
        previous_case, previous_backend = row.case, backend
        label = [str(row.case) if new_case else "", *([backend if new_backend else ""] if several else [])]
        figures = [f"{value:.1e}" for value in (row.error, row.eager, row.bound)]
        table.add_row(*label, row.output, *figures, "[green]ok" if row.passed else f"[bold red]OVER[/] {row.note}")
    stdout, _ = common.consoles()
    stdout.print(table)
    stdout.print(_summary(results, backends))
    if missing:
        stdout.print(f"Not checked: the Triton kernels, which cannot run on {device} here. {INTERPRETER_HINT}")


def _summary(results: Sequence[tuple[str, oracle.Row]], backends: Sequence[str]) -> str:
    cases = len({row.case for _, row in results})
    over = sum(not row.passed for _, row in results)
    closest_backend, closest = max(results, key=lambda result: result[1].error / result[1].bound)
    head = (
        f"[bold red]{over} of {len(results)} errors are over their bounds"
        if over
        else (f"[bold green]all {len(results)} errors are within their bounds")
    )
    return (
        f"{head}[/] ({cases} cases, {' and '.join(backends)} backend). "
        f"Largest, as a share of its bound: {closest.error / closest.bound:.2f}, "
        f"{closest.output} of {closest.case} ({closest_backend})."
    )


def _report(results: Sequence[tuple[str, oracle.Row]], args: argparse.Namespace, backends: Sequence[str]) -> dict[str, Any]:
    return {
        "passed": all(row.passed for _, row in results),
        "device": str(args.device),
        "backends": backends,
        "seed": args.seed,
        "cases": args.cases,
        "rows": [{"backend": backend, **_plain(row)} for backend, row in results],
    }


def _plain(row: oracle.Row) -> dict[str, Any]:
    """A row in JSON's types; an infinite error becomes null."""
    case = {key: str(value) if isinstance(value, torch.dtype) else value for key, value in asdict(row.case).items()}
    figures = {name: getattr(row, name) for name in ("error", "eager", "bound")}
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"case": case, "output": row.output, **finite, "passed": row.passed, "note": row.note}
