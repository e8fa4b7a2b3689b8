"""`fastlora bench`: what a LoRA linear costs beside its frozen linear and beside eager LoRA, on this machine."""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import benchmark, oracle
from fastlora.cli import common
from fastlora.functional import BACKENDS

DESCRIPTION = """\
Time forward and forward + backward of the frozen linear alone (the floor), of eager LoRA as PEFT computes it, and of
fastlora, on the same random tensors, in turn, each checked against float64 first; count the bytes each saves for backward and
the most memory each takes. On a GPU the clock is CUDA events; on a CPU fastlora runs its torch backend.
Writes bench.csv and bench.png."""

#: device type -> (M, K, N, dtype)
DEFAULTS = {"cpu": (2048, 1024, 1024, "float32"), "cuda": (8192, 4096, 4096, "bfloat16")}

WIDE_SPREAD = 1.5  # p80 / p20; an undisturbed run stays below 1.1


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    sizes = {kind: f"{m} x {k} -> {n} in {dtype} on {kind}" for kind, (m, k, n, dtype) in DEFAULTS.items()}
    parser = subparsers.add_parser(
        "bench",
        help="time forward and backward against eager LoRA",
        description=DESCRIPTION,
        epilog=f"Default size: {', '.join(sizes.values())}. Exit code: 0 measured, 1 a result was wrong, 2 wrong usage.",
    )
    number = common.positive_int
    parser.add_argument("-M", "--rows", type=number, metavar="M", help="rows of x: tokens in the batch")
    parser.add_argument("-K", "--in-features", type=number, metavar="K", help="width of x")
    parser.add_argument("-N", "--out-features", type=number, metavar="N", help="width of y")
    parser.add_argument("-r", "--rank", type=number, default=16, metavar="R", help="LoRA rank (default: 16)")
    parser.add_argument(
        "-p", "--dropout", type=common.probability, default=0.1, metavar="P", help="dropout rate in [0, 1] (default: 0.1)"
    )
    parser.add_argument("--dtype", choices=common.DTYPES, help="of x, weight and bias")
    parser.add_argument(
        "--adapter-dtype", choices=common.DTYPES, help="of A and B: that dtype or float32 (default: that dtype)"
    )
    parser.add_argument("--bias", action="store_true", help="add a frozen bias")
    parser.add_argument("--repeats", type=number, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs and the masks (default: 0)")
    parser.add_argument("--backend", choices=BACKENDS, help="of fastlora (default: triton on a GPU, torch on a CPU)")
    parser.add_argument(
        "--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("fastlora-bench"),
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the files; the exit code."""
    for module in ("rich", "matplotlib"):
        common.require(module)
    device: torch.device = args.device
    if args.backend not in (None, "torch") and device.type == "cpu":
        return common.refuse("bench", "the kernels run on a CPU only in Triton's interpreter, whose time means nothing")
    try:
        case = _case(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return common.refuse("bench", str(error))
    backend = args.backend or ("torch" if device.type == "cpu" else None)
    try:
        measurements = _measure(benchmark.contenders(case, backend), case, args)
    except benchmark.WrongResultError as error:
        common.consoles()[1].print(str(error), style="red", markup=False)
        return 1
    rows = _rows(measurements)
    facts = {**_facts(case), "repeats": args.repeats, "seed": args.seed, **benchmark.environment(device)}
    _write_csv([{**row, **facts} for row in rows], args.output / "bench.csv")
    _plot(rows, _title(case, facts), _conditions(facts), args.output / "bench.png")
    if args.json:
        print(
            json.dumps(
                {"facts": facts, "rows": rows, "files": [str(args.output / f"bench.{s}") for s in ("csv", "png")]}, indent=2
            )
        )
    else:
        _print(rows, case, facts, args.output)
    return 0


def _case(args: argparse.Namespace) -> oracle.Case:
    m, k, n, dtype = DEFAULTS[args.device.type]
    base = common.DTYPES[args.dtype or dtype]
    adapters = common.DTYPES[args.adapter_dtype] if args.adapter_dtype else base
    shape = args.rows or m, args.in_features or k, args.out_features or n
    return oracle.Case(shape, args.rank, base, adapters, bias=args.bias, dropout_p=args.dropout, seed=args.seed)


def _measure(rivals: Sequence[benchmark.Contender], case: oracle.Case, args: argparse.Namespace) -> list[benchmark.Measurement]:
    from rich.progress import Progress

    _, stderr = common.consoles()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("checking against float64", total=len(rivals) + benchmark.WARMUP + args.repeats)
        return benchmark.measure(
            rivals,
            case,
            args.device,
            repeats=args.repeats,
            progress=lambda what: progress.update(task, advance=1, description=what),
        )


def _rows(measurements: Sequence[benchmark.Measurement]) -> list[dict[str, Any]]:
    """One row for each pass of each contender; bytes stand with forward + backward."""
    frozen, eager = measurements[:2]
    rows = []
    for name in benchmark.PASSES:
        for measurement in measurements:
            p20, median, p80 = measurement.quantiles(name)
            whole = name == benchmark.PASSES[-1]
            rows.append(
                {
                    "contender": measurement.contender,
                    "pass": name,
                    "median_ms": median * 1e3,
                    "p20_ms": p20 * 1e3,
                    "p80_ms": p80 * 1e3,
                    "over_frozen": median / frozen.quantiles(name)[1],
                    "over_eager": median / eager.quantiles(name)[1],
                    "saved_bytes": measurement.saved_bytes if whole else None,
                    "peak_bytes": measurement.peak_bytes if whole else None,
                }
            )
    return rows


def _facts(case: oracle.Case) -> dict[str, Any]:
    m, k, n = case.shape
    dtypes = {"dtype": _name(case.dtype), "adapter_dtype": _name(case.adapters)}
    return {"M": m, "K": k, "N": n, "r": case.rank, "p": case.dropout_p, **dtypes, "bias": case.bias}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(case: oracle.Case, facts: dict[str, Any]) -> str:
    m, k, n = case.shape
    dtypes = facts["dtype"] + (f" with {facts['adapter_dtype']} adapters" if case.adapters != case.dtype else "")
    bias = ", bias" if case.bias else ""
    return f"LoRA linear, M={m} K={k} N={n} r={case.rank} p={case.dropout_p:g}, {dtypes}{bias}"


def _conditions(facts: dict[str, Any]) -> str:
    threads = f", threads: {facts['threads']}" if "threads" in facts else ""
    return f"{facts['device']}{threads}, torch {facts['torch']}, median of {facts['repeats']} rounds"


def _print(rows: Sequence[dict[str, Any]], case: oracle.Case, facts: dict[str, Any], folder: Path) -> None:
    from rich import box
    from rich.table import Table

    x_size = _three_digits(case.shape[0] * case.shape[1] * case.dtype.itemsize / 2**20)
    caption = f"{_conditions(facts)}\nsaved for backward: all that autograd keeps but parameters; x is {x_size} MiB"
    table = Table(title=_title(case, facts), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("pass")
    table.add_column("contender")
    for heading in (
        "median\nms",
        "p20\nms",
        "p80\nms",
        "×\nfrozen",
        "×\neager",
        "saved for\nbackward\nMiB",
        "peak\nmemory\nMiB",
    ):
        table.add_column(heading, justify="right")
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1]["pass"] != row["pass"]
        if first and index:
            table.add_row()
        table.add_row(
            row["pass"] if first else "",
            row["contender"],
            *(_three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")),
            f"{row['over_frozen']:.2f}",
            f"{row['over_eager']:.2f}",
            *("" if row[key] is None else _three_digits(row[key] / 2**20) for key in ("saved_bytes", "peak_bytes")),
        )
    stdout, _ = common.consoles()
    stdout.print(table)
    if any(row["p80_ms"] > WIDE_SPREAD * row["p20_ms"] for row in rows):
        stdout.print("[yellow]The times scatter widely: something else ran on this machine, and the ratios mean little.")
    stdout.print(f"Every contender was within its float64 bound before it was timed. Written: {folder}/bench.csv, bench.png")


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _plot(rows: Sequence[dict[str, Any]], title: str, conditions: str, path: Path) -> None:
    """Bars of the medians with whiskers from p20 to p80, one panel for each pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    colours = ("#9aa0a6", "#d98c3f", "#2a6fbb")
    for axes, name in zip(figure.subplots(1, len(benchmark.PASSES)), benchmark.PASSES, strict=True):
        bars = [row for row in rows if row["pass"] == name]
        medians = [row["median_ms"] for row in bars]
        spread = [[row["median_ms"] - row["p20_ms"] for row in bars], [row["p80_ms"] - row["median_ms"] for row in bars]]
        drawn = axes.bar([row["contender"] for row in bars], medians, yerr=spread, capsize=5, color=colours[: len(bars)])
        labels = [f"{_three_digits(row['median_ms'])} ms\n{row['over_frozen']:.2f} × frozen" for row in bars]
        axes.bar_label(drawn, labels, padding=4, fontsize=9)
        axes.set_title(name)
        axes.set_ylabel("milliseconds")
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(f"{conditions}; whiskers: 20th to 80th percentile", fontsize=8, color="#5f6368")
    figure.savefig(path, dpi=150)
