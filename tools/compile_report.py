"""Print registers, spills and costs of every compiled kernel, without a GPU.  `python -m tools.compile_report --help`"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.budgets import BUDGETS, over_budget, record, recorded
from tools.cases import DTYPES, RANKS, SHAPES, STEPS, TARGETS, CompileCase, every_case, gated_cases
from tools.measure import PRODUCTS, KernelFacts, faults, measure

KERNELS = sorted({kernel for kernels in PRODUCTS for kernel in kernels})
WIDTH_IN_A_FILE = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print.  Return 1 when a kernel has a fault, exceeds its budget or does not compile, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    cases = gated_cases() if options.gated or options.record else _selected(options)
    if not cases:
        parser.error("--step, --dtype, --rank, --capability and --shape select no case")
    messages = Console(stderr=True)
    rows, complaints = _measure(cases, options.jobs, messages)
    if options.record:
        record(rows)
        messages.print(f"recorded {len(rows)} budgets in {BUDGETS}")
    rows = [row for row in rows if row.kernel in (options.kernel or KERNELS)]
    if options.json:
        json.dump([_as_dict(row) for row in rows], sys.stdout, indent=1)
    else:
        _print_tables(rows)
    complaints += [f"{row.key}: {fault}" for row in rows for fault in _complaints(row)]
    for complaint in complaints:
        messages.print(complaint, markup=False, highlight=False, soft_wrap=True, style="red")
    messages.print(f"{len(rows)} kernels, Triton {triton.__version__}, {len(complaints)} complaints")
    return 1 if complaints else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_report",
        description="Compile the kernels of fastlora without a GPU and print what the compiler made of them. Triton caches "
        "compiled kernels, so a second run is fast.",
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="print only these kernels")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of x and W; after '+', of A and B")
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS, help="default: 8 16 64 128")
    parser.add_argument("--capability", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["aligned"], help="of the operands (default: aligned)")
    parser.add_argument("--gated", action="store_true", help="compile what the tests compile; ignores the filters above")
    parser.add_argument("--record", action="store_true", help="as --gated, and store the costs as the budgets of the tests")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    return parser


def _selected(options: argparse.Namespace) -> list[CompileCase]:
    return [
        case
        for case in every_case(options.rank, options.shape)
        if case.step in options.step and case.dtype in options.dtype and case.capability in options.capability
    ]


def _measure(cases: Sequence[CompileCase], jobs: int, messages: Console) -> tuple[list[KernelFacts], list[str]]:
    """(the kernels of all cases, in the order of the cases; a message for each case that did not compile)."""
    rows: dict[CompileCase, list[KernelFacts]] = {}
    errors = []
    # Spawn, not fork: a forked process inherits the locks of torch's threads but not the threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, case): case for case in cases}
        for future in track(as_completed(futures), "compiling", len(futures), console=messages):
            error = future.exception()
            if error is None:
                rows[futures[future]] = future.result()
            else:
                errors.append(f"{futures[future]}: {type(error).__name__}: {error}")
    return [row for case in cases for row in rows.get(case, [])], errors


def _complaints(row: KernelFacts) -> list[str]:
    budget = recorded().get(row.key)
    return faults(row) + (over_budget(row, budget) if budget is not None else [])


def _as_dict(row: KernelFacts) -> dict[str, object]:
    fields = dataclasses.asdict(row)
    return fields.pop("case") | fields | fields.pop("sass") | {"complaints": _complaints(row)}


def _print_tables(rows: Sequence[KernelFacts]) -> None:
    """One table per capability and shape.  A kernel with a complaint is red."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_A_FILE)
    for capability, shape in sorted({(row.case.capability, row.case.shape) for row in rows}):
        M, K, N = SHAPES[shape]
        table = Table(title=f"compute capability {capability}: x ({M}, {K}), W ({N}, {K}), Triton {triton.__version__}")
        for text in ("dtype", "kernel", "tile", "drop"):
            table.add_column(text)
        for number in (
            "rank",
            "warps",
            "stages",
            "regs",
            "spills",
            "shared",
            "mma",
            "hgmma",
            "conv",
            "slots/elt",
            "mask/elt",
            "narrow",
        ):
            table.add_column(number, justify="right")
        for row in rows:
            if (row.case.capability, row.case.shape) == (capability, shape):
                table.add_row(*_cells(row), style="red" if _complaints(row) else None)
        console.print(table)
    console.print(
        "spills: bytes of stack per thread / local loads and stores; shared: bytes; mma: tensor-core instructions; conv: "
        "layout conversions; slots/elt: issue slots of the loop per element, two for an instruction of the busiest half-rate "
        "pipe; mask/elt: instructions that dropout adds per element; narrow: loads below 8 bytes per thread"
    )


def _cells(row: KernelFacts) -> list[str]:
    sass, config = row.sass, row.config
    tile = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.items() if name.startswith("BLOCK"))
    per_element = ("" if value is None else f"{value:.1f}" for value in (row.per_element, row.per_masked_element))
    drop, spills = "yes" if row.dropout else "", f"{sass.stack}/{sass.local}"
    size = (row.case.rank, config["num_warps"], config["num_stages"], sass.registers, spills, row.shared)
    counts = (sass.tensor_core, sass.hgmma, row.conversions, *per_element, sass.narrow_loads)
    return [row.case.dtype, f"{row.product} = {row.kernel}", tile, drop, *map(str, size + counts)]


if __name__ == "__main__":
    sys.exit(main())
