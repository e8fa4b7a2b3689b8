"""Time forward, backward and both of the frozen linear alone (the lower limit),
eager LoRA, PEFT's own layer, chained addmm_ and fastlora, on the same random
tensors, in turn. Check each against float64 first. Count the bytes that each
saves for backward and its peak memory, and measure what a matrix product and a
copy reach on this machine. On a GPU the clock is CUDA events, and fastlora is
timed in each of its forms. On a CPU it runs its torch backend. Write bench.csv
and bench.png."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import benchmark, oracle
from fastlora.benchmark import ceilings, clock, providers, results
from fastlora.cli import common
from fastlora.cli.common import three_digits
from fastlora.environment import environment

#: device type -> (M, K, N, dtype)
DEFAULTS = {"cpu": (2048, 1024, 1024, "float32"), "cuda": (8192, 4096, 4096, "bfloat16")}
COLUMNS = ("median\nms", "p20\nms", "p80\nms", "×\nfrozen", "×\neager", "% of\nroofline", "saved\nMiB", "peak\nMiB")


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    sizes = ", ".join(f"{m} x {k} -> {n} in {dtype} on {kind}" for kind, (m, k, n, dtype) in DEFAULTS.items())
    codes = "Exit code: 0 measured, 1 wrong result or no memory, 2 wrong arguments."
    help_ = "time forward and backward against eager LoRA"
    parser = subparsers.add_parser("bench", help=help_, description=__doc__, epilog=f"Default size: {sizes}. {codes}")
    add, number = parser.add_argument, common.positive_int
    add("-M", "--rows", type=number, metavar="M", help="rows of x: tokens in the batch")
    add("-K", "--in-features", type=number, metavar="K", help="width of x")
    add("-N", "--out-features", type=number, metavar="N", help="width of y")
    add("-r", "--rank", type=number, default=16, metavar="R", help="LoRA rank (default: 16)")
    add("-p", "--dropout", type=common.probability, default=0.1, metavar="P", help="dropout rate in [0, 1] (default: 0.1)")
    add("--dtype", choices=common.DTYPES, help="of x, weight and bias")
    add("--adapter-dtype", choices=common.DTYPES, help="of A and B: that dtype or float32 (default: that dtype)")
    add("--bias", action="store_true", help="add a frozen bias")
    add("--repeats", type=number, default=20, metavar="N", help="timed rounds (default: 20)")
    add("--seed", type=int, default=0, help="seed of the inputs and the masks (default: 0)")
    only = "time this provider beside the frozen linear and eager LoRA; may be repeated (default: all that run here): "
    only += ", ".join(providers.NAMES[2:])
    add("--only", action="append", choices=providers.NAMES, metavar="PROVIDER", help=only)
    add("--compile", choices=providers.COMPILERS, help="add the providers under torch.compile with this backend")
    add("--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    folder = Path("fastlora-bench")
    add("-o", "--output", type=Path, default=folder, metavar="DIR", help="where the files go (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the files; the exit code."""
    for module in ("rich", "matplotlib"):
        common.require(module)
    try:
        case = _case(args)
        rivals = _rivals(case, args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return common.refuse("bench", str(error))
    try:
        with common.progress(len(rivals) + clock.WARMUP + args.repeats) as step:
            rows, _ = benchmark.run(rivals, case, args.device, repeats=args.repeats, progress=step)
            rates = ceilings.measure_ceilings(case.dtype, args.device)
    except RuntimeError as error:
        expected = isinstance(error, benchmark.WrongResultError | torch.OutOfMemoryError)
        if not expected and "DefaultCPUAllocator" not in str(error):  # how torch runs out of a CPU's memory
            raise
        common.consoles()[1].print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    rows = results.linear_rows(rows, case, rates)
    asked = {**results.facts_of(case), "repeats": args.repeats, "seed": args.seed}
    facts = {**asked, **rates._asdict(), **environment(args.device)}
    csv, png = args.output / "bench.csv", args.output / "bench.png"
    results.write_csv([{**row, **facts} for row in rows], csv)
    results.plot(rows, _conditions(facts), png)
    if args.json:
        print(common.to_json({"facts": facts, "rows": rows, "files": [csv, png]}))
    else:
        _print(rows, facts, args.output)
    return 0


def _case(args: argparse.Namespace) -> oracle.Case:
    m, k, n, dtype = DEFAULTS[args.device.type]
    base = common.DTYPES[args.dtype or dtype]
    adapters = common.DTYPES[args.adapter_dtype] if args.adapter_dtype else base
    shape = args.rows or m, args.in_features or k, args.out_features or n
    return oracle.Case(shape, args.rank, base, adapters, bias=args.bias, dropout_p=args.dropout, seed=args.seed)


def _rivals(case: oracle.Case, args: argparse.Namespace) -> list[providers.Provider]:
    """The providers asked for; ValueError for one that cannot compute the case here."""
    rivals = providers.providers_for(case, args.device, compiler=args.compile)
    here = [provider.name for provider in rivals]
    if missing := set(args.only or here) - set(here):
        raise ValueError(f"{', '.join(sorted(missing))} cannot run {case} on {args.device} (can: {', '.join(here)})")
    wanted = {providers.FROZEN, providers.EAGER, *(args.only or here)}
    return [provider for provider in rivals if provider.name in wanted]


def _conditions(facts: Mapping[str, Any]) -> str:
    threads = f", threads: {facts['threads']}" if "threads" in facts else ""
    return f"{facts['device']}{threads}, torch {facts['torch']}, median of {facts['repeats']} rounds"


def _print(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], folder: Path) -> None:
    x_size = three_digits(facts["M"] * facts["K"] * getattr(torch, facts["dtype"]).itemsize / 2**20)
    rates = f"matrix product {three_digits(facts['gemm_tflops'])} TFLOP/s, copy {three_digits(facts['copy_gbps'])} GB/s"
    saved = f"saved: all that autograd keeps for backward but parameters; x is {x_size} MiB"
    caption = f"{_conditions(facts)}\nmeasured here: {rates}\n{saved}"
    columns = {"provider": "left", **dict.fromkeys(COLUMNS, "right")}
    stdout, _ = common.consoles()
    stdout.print(common.table(f"LoRA linear, {results.title(facts)}", columns, _lines(rows), caption))
    if results.scattered(rows):
        stdout.print("[yellow]The times scatter widely: something else ran on this machine, and the ratios mean little.")
    stdout.print("Every provider was within its float64 bound before it was timed.")
    stdout.print(f"Written to {folder}: bench.csv, bench.png", soft_wrap=True)


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A line with the name of each pass, and below it a line for each provider."""
    for pass_ in benchmark.PASSES:
        yield [f"[bold]{pass_}"]
        for row in rows:
            if row["pass"] == pass_:
                times = [three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")]
                shares = [f"{row['over_frozen']:.2f}", f"{row['over_eager']:.2f}", f"{row['roofline_percent']:.0f}"]
                sizes = [three_digits(row[key] / 2**20) for key in ("saved_bytes", "peak_bytes") if row[key] is not None]
                yield [f" {row['provider']}", *times, *shares, *sizes]
