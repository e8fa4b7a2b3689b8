"""Compute y, dx, dA, dB and dbias with fastlora.lora_linear and compare each with float64, from the same inputs and the same
dropout mask. An error passes when it is at most twice that of eager LoRA in the same dtypes, or below the dtype's floor.
In the drawn cases every dtype, shape, rank, dropout rate and bias setting comes up equally often. With --function, check a
function of yours instead, on a fixed list of cases; its signature is in docs/parity.md."""

import argparse
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from fastlora import backends, oracle
from fastlora.cli import common, own_function

#: name -> (base dtype, adapter dtype), "bfloat16+float32" say.
DTYPES = {"+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in pair)): pair for pair in oracle.FLOOR}
EVERYWHERE = [name for name, pair in DTYPES.items() if pair in oracle.DTYPES]  # without float64, which kernels do not take
#: (M, K, N): tiny, one row, odd, one over a tile, exact tiles, wide, larger.
SHAPES = ((3, 6, 9), (1, 64, 48), (7, 33, 65), (65, 129, 31), (64, 128, 64), (40, 24, 200), (300, 320, 256))
RANKS = (1, 3, 8, 16, 33, 64, 130)
DROPOUTS = (0.0, 0.1, 0.5, 1.0)
BIAS = (True, False)
#: The Triton backend in each of its forms, and the torch backend.
BACKENDS = ("fused", "addmm", "torch")

INTERPRETER_HINT = "Triton's interpreter runs its kernels on a CPU: TRITON_INTERPRET=1 fastlora parity"

Check = Callable[[oracle.Case], list[oracle.Row]]
Verdicts = list[tuple[str, oracle.Row]]  # (backend, row)


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    codes = f"Exit code: 0 every error within its bound, 1 one over it, 2 wrong arguments. {INTERPRETER_HINT}"
    help_ = "check forward and all gradients against float64"
    parser = subparsers.add_parser("parity", help=help_, description=__doc__, epilog=codes)
    add = parser.add_argument
    add("--function", metavar="MODULE:NAME", help="check this function, imported from here or the Python path")
    add("--cases", type=common.positive_int, metavar="N", help="cases to draw (default: 40)")
    add("--seed", type=int, default=0, help="seed of the cases, their inputs and their masks (default: 0)")
    add("--dtype", action="append", choices=DTYPES, help="base dtype, or base+adapters; may be repeated (default: all)")
    add("--backend", choices=BACKENDS, help="default: all that run on the device")
    add("--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check the cases and print the verdicts; the exit code."""
    common.require("rich")
    available = backends.available_backends(args.device)
    try:
        checks = _checks(args, available)
    except ValueError as error:
        return common.refuse("parity", str(error))
    if args.function:
        cases = own_function.cases([DTYPES[name] for name in args.dtype or DTYPES], args.seed)
    else:
        cases = draw_cases(args.dtype or EVERYWHERE, args.cases or 40, args.seed)
    verdicts = _verdicts(cases, checks)
    over = sum(not row.passed for _, row in verdicts)
    if args.json:
        facts = {"device": str(args.device), "backends": list(checks), "seed": args.seed, "cases": len(cases)}
        rows = [{"backend": backend, **asdict(row), "passed": row.passed} for backend, row in verdicts]
        print(common.to_json({"passed": not over, **facts, "rows": rows}))
        return min(over, 1)
    stdout, _ = common.consoles()
    figures = ("yours" if args.function else "fastlora", "eager", "bound")
    columns = {"backend": "left", "output": "left", **dict.fromkeys(figures, "right"), "verdict": "left"}
    stdout.print(common.table(f"relative error against float64 on {args.device}", columns, _lines(verdicts)))
    head = f"[bold green]all {len(verdicts)} errors are within their bounds"
    if over:
        head = f"[bold red]{over} of {len(verdicts)} errors are over their bounds"
    backend, row = max(verdicts, key=lambda verdict: verdict[1].error / verdict[1].bound)
    share = f"{row.error / row.bound:.2f}, {row.output} of {row.case} ({backend})"
    checked = f"{len(cases)} cases, {args.function or ' and '.join(checks) + ' backend'}"
    stdout.print(f"{head}[/] ({checked}). Largest, as a share of its bound: {share}.")
    if not (args.backend or args.function) and "fused" not in available:
        stdout.print(f"Not checked: the Triton kernels, which cannot run on {args.device} here. {INTERPRETER_HINT}")
    return min(over, 1)


def draw_cases(dtypes: Sequence[str], count: int, seed: int) -> list[oracle.Case]:
    """`count` cases in which the values of each axis come up equally often, to within one."""
    generator = random.Random(seed)

    def axis(values: Sequence[Any]) -> list[Any]:
        return [value for _ in range(0, count, len(values)) for value in generator.sample(values, len(values))][:count]

    columns = [axis(values) for values in (dtypes, SHAPES, RANKS, DROPOUTS, BIAS)]
    drawn = sorted(zip(*columns, strict=True), key=lambda values: list(DTYPES).index(values[0]))
    return [
        oracle.Case(shape, rank, *DTYPES[name], bias=bias, dropout_p=p, seed=seed + index)
        for index, (name, shape, rank, p, bias) in enumerate(drawn)
    ]


def _checks(args: argparse.Namespace, available: Sequence[str]) -> dict[str, Check]:
    """The check of the user's function, or of each backend, by name; ValueError for options that do not go together."""
    if args.function:
        if args.backend or args.cases:
            raise ValueError("--function has its own list of cases and no backends: leave out --cases and --backend")
        return {args.function: partial(own_function.check, function=own_function.load(args.function), device=args.device)}
    if args.dtype and "float64" in args.dtype:
        raise ValueError("--dtype float64 is for --function: the kernels do not compute in it")
    if args.backend and args.backend not in available:
        hint = f" {INTERPRETER_HINT} --backend {args.backend}" if args.device.type == "cpu" else ""
        raise ValueError(f"the {args.backend} backend cannot run on {args.device}.{hint}")
    backends = [args.backend] if args.backend else [name for name in available if name in BACKENDS]
    return {backend: partial(oracle.check, backend=backend, device=args.device) for backend in backends}


def _verdicts(cases: Sequence[oracle.Case], checks: Mapping[str, Check]) -> Verdicts:
    verdicts = []
    with warnings.catch_warnings(), common.progress(len(cases) * len(checks)) as step:
        warnings.filterwarnings("ignore", message="r=.* is above min")  # such ranks are among those to check
        for case in cases:
            for name, check in checks.items():
                try:
                    verdicts += [(name, row) for row in check(case)]
                except Exception as error:
                    error.add_note(f"while checking {case}, seed {case.seed}, on the {name} backend")
                    raise
                step(f"{name}: {case}")
    return verdicts


def _lines(verdicts: Verdicts) -> Iterator[list[str]]:
    """A line with each case, and below it a line for each backend and output."""
    from rich.markup import escape

    for case, rows in itertools.groupby(verdicts, key=lambda verdict: verdict[1].case):
        yield [f"[bold]{case}"]
        for backend, row in rows:
            figures = [f"{value:.1e}" for value in (row.error, row.eager, row.bound)]
            yield [f" {backend}", row.output, *figures, "[green]ok" if row.passed else f"[bold red]OVER[/] {escape(row.note)}"]
