"""`fastlora bench`: what a LoRA linear costs beside its frozen linear and beside eager LoRA, on this machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import benchmark, oracle
from fastlora.benchmark import clock, plot, providers, results
from fastlora.benchmark.plot import three_digits
from fastlora.cli import common
from fastlora.environment import environment

DESCRIPTION = """\
Time forward, backward and both of the frozen linear alone (the floor), of eager LoRA, PEFT's own layer, chained addmm_ and
fastlora, on the same random tensors, in turn, each checked against float64 first; count the bytes each saves for backward and
the most memory each takes, and measure what a matrix product and a copy reach on this machine.
On a GPU the clock is CUDA events, and fastlora is timed in each of its forms; on a CPU it runs its torch backend.
Writes bench.csv and bench.png."""

#: device type -> (M, K, N, dtype)
DEFAULTS = {"cpu": (2048, 1024, 1024, "float32"), "cuda": (8192, 4096, 4096, "bfloat16")}


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    sizes = {kind: f"{m} x {k} -> {n} in {dtype} on {kind}" for kind, (m, k, n, dtype) in DEFAULTS.items()}
    parser = subparsers.add_parser(
        "bench",
        help="time forward and backward against eager LoRA",
        description=DESCRIPTION,
        epilog=f"Default size: {', '.join(sizes.values())}. "
        "Exit code: 0 measured, 1 wrong result or no memory, 2 wrong arguments.",
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
    parser.add_argument(
        "--only",
        action="append",
        choices=providers.NAMES,
        metavar="PROVIDER",
        help="time this one beside the frozen linear and eager LoRA, and what else is named so (default: all that run here): "
        + ", ".join(providers.NAMES[2:]),
    )
    parser.add_argument(
        "--compile", choices=providers.COMPILERS, help="add the providers under torch.compile with this backend"
    )
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
    try:
        case = _case(args)
        rivals = _rivals(case, args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return common.refuse("bench", str(error))
    try:
        measurements = _measure(rivals, case, args)
    except (benchmark.WrongResultError, torch.OutOfMemoryError) as error:
        common.consoles()[1].print(str(error), style="red", markup=False)
        return 1
    ceilings = benchmark.measure_ceilings(case.dtype, device)
    rows = results.rows_of(measurements, case, ceilings)
    facts = {
        **results.facts_of(case),
        "repeats": args.repeats,
        "seed": args.seed,
        "gemm_tflops": ceilings.gemm / 1e12,
        "copy_gbps": ceilings.copy / 1e9,
        **environment(device),
    }
    results.write_csv([{**row, **facts} for row in rows], args.output / "bench.csv")
    plot.bars(rows, _title(case, facts), _conditions(facts), args.output / "bench.png")
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


def _measure(rivals: Sequence[benchmark.Provider], case: oracle.Case, args: argparse.Namespace) -> list[benchmark.Measurement]:
    from rich.progress import Progress

    _, stderr = common.consoles()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("checking against float64", total=len(rivals) + clock.WARMUP + args.repeats)
        return benchmark.run(
            rivals,
            case,
            args.device,
            repeats=args.repeats,
            progress=lambda what: progress.update(task, advance=1, description=what),
        )


def _rivals(case: oracle.Case, args: argparse.Namespace) -> list[benchmark.Provider]:
    """The providers asked for; ValueError for one that cannot compute the case here."""
    rivals = benchmark.providers_for(case, args.device, compiler=args.compile)
    if args.only is None:
        return rivals
    if missing := set(args.only) - {provider.name for provider in rivals}:
        here = ", ".join(provider.name for provider in rivals)
        raise ValueError(f"{', '.join(sorted(missing))} cannot run {case} on {args.device} (can: {here})")
    return [provider for provider in rivals if provider.name in {*providers.NAMES[:2], *args.only}]


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

    x_size = three_digits(case.shape[0] * case.shape[1] * case.dtype.itemsize / 2**20)
    ceilings = f"measured here: matrix product {facts['gemm_tflops']:.3g} TFLOP/s, copy {facts['copy_gbps']:.3g} GB/s"
    saved = f"saved for backward: all that autograd keeps but parameters; x is {x_size} MiB"
    caption = f"{_conditions(facts)}\n{ceilings}\n{saved}"
    table = Table(title=_title(case, facts), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("pass")
    table.add_column("provider")
    for heading in (
        "median\nms",
        "p20\nms",
        "p80\nms",
        "×\nfrozen",
        "×\neager",
        "% of\nroofline",
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
            row["provider"],
            *(three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")),
            f"{row['over_frozen']:.2f}",
            f"{row['over_eager']:.2f}",
            f"{row['roofline_percent']:.0f}",
            *("" if row[key] is None else three_digits(row[key] / 2**20) for key in ("saved_bytes", "peak_bytes")),
        )
    stdout, _ = common.consoles()
    stdout.print(table)
    if results.scattered(rows):
        stdout.print("[yellow]The times scatter widely: something else ran on this machine, and the ratios mean little.")
    stdout.print(f"Every provider was within its float64 bound before it was timed. Written: {folder}/bench.csv, bench.png")
