"""Print what the compiler made of every kernel; no GPU is needed. `python -m tools.compile_report --help`"""

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
from tools.cases import DTYPES, RANKS, SHAPES, STEPS, TARGETS, Case, every_case, gated_cases
from tools.measure import PRODUCTS, Row, faults, measure

KERNELS = sorted({kernel for kernels in PRODUCTS for kernel in kernels})
WIDTH_IN_A_FILE = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and return the exit status: 1 when a kernel is at fault, over its budget or does not compile."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    cases = gated_cases() if options.gated or options.record else _selected(options)
    if not cases:
        parser.error("no case is left: --step, --dtype, --rank, --capability and --shape select nothing")
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
        description="Compile the kernels of fastlora for GPUs that need not be there and print what came out. Triton caches "
        "what it compiles, so a second run is quick.",
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="print only these kernels")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of x and W; after '+' of A and B")
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS, help="any (default: 8 16 64 128)")
    parser.add_argument("--capability", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["aligned"], help="of the operands (default: aligned)")
    parser.add_argument("--gated", action="store_true", help="compile what the tests compile, whatever the filters above")
    parser.add_argument("--record", action="store_true", help="as --gated, and make what is measured the tests' budget")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser


def _selected(options: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in every_case(options.rank, options.shape)
        if case.step in options.step and case.dtype in options.dtype and case.capability in options.capability
    ]


def _measure(cases: Sequence[Case], jobs: int, messages: Console) -> tuple[list[Row], list[str]]:
    """The rows of all cases in their order, and a line for each case that did not compile."""
    rows: dict[Case, list[Row]] = {}
    errors = []
    # Spawned, not forked: torch has threads, and a forked process would inherit their locks without them.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, case): case for case in cases}
        for future in track(as_completed(futures), "compiling", len(futures), console=messages):
            error = future.exception()
            if error is None:
                rows[futures[future]] = future.result()
            else:
                errors.append(f"{futures[future]}: {type(error).__name__}: {error}")
    return [row for case in cases for row in rows.get(case, [])], errors


def _complaints(row: Row) -> list[str]:
    budget = recorded().get(row.key)
    return faults(row) + (over_budget(row, budget) if budget is not None else [])


def _as_dict(row: Row) -> dict[str, object]:
    fields = dataclasses.asdict(row)
    return fields.pop("case") | fields | fields.pop("sass") | {"complaints": _complaints(row)}


def _print_tables(rows: Sequence[Row]) -> None:
    """A table for each capability and shape; a kernel at fault is red."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_A_FILE)
    for capability, shape in sorted({(row.case.capability, row.case.shape) for row in rows}):
        M, K, N = SHAPES[shape]
        table = Table(title=f"compute capability {capability}: x ({M}, {K}), W ({N}, {K}), Triton {triton.__version__}")
        for text in ("dtype", "kernel", "tile", "drop"):
            table.add_column(text)
        for number in ("rank", "warps", "stages", "regs", "spills", "shared", "mma", "hgmma", "conv", "instr/elt", "narrow"):
            table.add_column(number, justify="right")
        for row in rows:
            if (row.case.capability, row.case.shape) == (capability, shape):
                table.add_row(*_cells(row), style="red" if _complaints(row) else None)
        console.print(table)
    console.print(
        "spills: bytes of stack a thread / local loads and stores; shared: bytes; mma: tensor-core instructions; conv: layout "
        "conversions; instr/elt: instructions that dropout adds an element; narrow: global loads under 8 bytes a thread"
    )


def _cells(row: Row) -> list[str]:
    sass, config = row.sass, row.config
    tile = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.items() if name.startswith("BLOCK"))
    cost = "" if row.per_masked_element is None else f"{row.per_masked_element:.1f}"
    drop, spills = "yes" if row.dropout else "", f"{sass.stack}/{sass.local}"
    size = (row.case.rank, config["num_warps"], config["num_stages"], sass.registers, spills, row.shared)
    counts = (sass.tensor_core, sass.hgmma, row.conversions, cost, sass.narrow_loads)
    return [row.case.dtype, f"{row.product} = {row.kernel}", tile, drop, *map(str, size + counts)]


if __name__ == "__main__":
    sys.exit(main())
