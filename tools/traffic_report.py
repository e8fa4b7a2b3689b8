"""Memory traffic of the kernels, counted under Triton's interpreter on a CPU.  `python -m tools.traffic_report --help`"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when kernels are imported

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastlora.kernels import steps
from fastlora.kernels.steps import FORMS
from fastlora.kernels.target import INTERPRETER, Target
from tools.traffic import CountedLaunch, counted

DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16+float32": (torch.float16, torch.float32),
    "float32": (torch.float32, torch.float32),
}
# kernels of a pass, in order -> the step of each.  A sum of partial results belongs to the step before it, that of dB to dA.
STEPS = {
    ("shrink", "gemm"): ("S", "y"),
    ("shrink", "gemm", "addmm_"): ("S", "y", "y"),
    ("grad_b", "grad_a", "gemm"): ("dS dB", "dA", "dx"),
    ("grad_b", "grad_a", "addmm_"): ("dS dB", "dA", "dx"),
    ("shrink", "grad_a", "grad_a", "gemm"): ("dS dB", "dS dB", "dA", "dx"),
    ("shrink", "grad_a", "grad_a", "addmm_"): ("dS dB", "dS dB", "dA", "dx"),
}
# (M, in, out): square, ragged (no descriptors, partial tiles), few rows.  They are small because the interpreter takes
# milliseconds per program.
SHAPES = ((512, 1024, 1024), (509, 1023, 1021), (32, 1024, 1024))
SMS, FULL_SIZE = 132, 8192 * 4096  # multiprocessors of an H200, and elements of x at full size
WIDTH_IN_A_FILE = 140


@dataclass(frozen=True)
class TrafficCase:
    """A LoRA linear: x (M, K), W (N, K), rank r.  dtype is a key of DTYPES, form one of FORMS."""

    M: int
    K: int
    N: int
    r: int = 16
    dtype: str = "bfloat16"
    dropout_p: float = 0.1
    form: str = "fused"
    bias: bool = True
    target: Target = INTERPRETER

    def run(self) -> tuple[list[CountedLaunch], list[CountedLaunch]]:
        """(launches of forward, launches of backward), on random operands."""
        base, adapter = DTYPES[self.dtype]
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = base) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        x, weight, dy = random(self.M, self.K), random(self.N, self.K), random(self.M, self.N)
        lora_A, lora_B = random(self.r, self.K, dtype=adapter), random(self.N, self.r, dtype=adapter)
        bias = random(self.N) if self.bias else None
        seed = torch.tensor([1234]) if self.dropout_p > 0 else None
        p, choice, target = self.dropout_p, self.form, self.target
        with counted() as forward:
            _, S = steps.forward(x, weight, lora_A, lora_B, bias, seed, 2.0, p, choice=choice, target=target)
        with counted() as backward:
            steps.backward(dy, x, weight, lora_A, lora_B, S, seed, 2.0, p, adapter, choice=choice, target=target)
        return forward, backward

    def compulsory(self) -> dict[str, tuple[int, int]]:
        """step -> bytes that it must (read, write): every operand once.  No partial results, no LoRA term written apart."""
        base, adapter = DTYPES[self.dtype]
        M, K, N, r, e, a = self.M, self.K, self.N, self.r, base.itemsize, adapter.itemsize
        S = dS = M * r * 4
        bits = M * -(-K // 8) if self.dropout_p > 0 and self.form == "fused" else 0
        seed = 8 if self.dropout_p > 0 else 0
        return {
            "S": (M * K * e + r * K * a + seed, S),
            "y": (M * K * e + N * K * e + S + N * r * a + (N * e if self.bias else 0), M * N * e),
            "dS dB": (M * N * e + N * r * a + S, dS + N * r * a),
            "dA": (M * K * e + dS + seed, r * K * a + bits),
            "dx": (M * N * e + N * K * e + dS + r * K * a + bits, M * K * e),
        }


@dataclass(frozen=True)
class StepTraffic:
    """The traffic of one step, in bytes.

    Attributes:
        kernels: its launches.  One in parentheses is an operation of torch, with its compulsory traffic.
        read: what the launches load.
        needed: what they load, each byte once per launch.
        written: what they store.
        compulsory: the least that the step must move.
    """

    case: TrafficCase
    step: str
    kernels: tuple[str, ...]
    read: int
    needed: int
    written: int
    compulsory: int

    @property
    def requested_ratio(self) -> float:
        return (self.read + self.written) / self.compulsory

    @property
    def ratio(self) -> float:
        return (self.needed + self.written) / self.compulsory


def scaled_target(M: int, K: int) -> Target:
    """A Hopper GPU with so few multiprocessors that each has the same share of x as at full size."""
    return Target(90, max(1, round(SMS * M * K / FULL_SIZE)), INTERPRETER.shared_memory)


def by_step(launches: Sequence[CountedLaunch]) -> dict[str, list[CountedLaunch]]:
    """step -> its launches, in order.  Raises KeyError when the launches of the pass are not in STEPS."""
    steps = iter(STEPS[tuple(launch.kernel for launch in launches if launch.kernel != "sum_partials")])
    groups: dict[str, list[CountedLaunch]] = {}
    step = ""
    for launch in launches:
        step = step if launch.kernel == "sum_partials" else next(steps)
        groups.setdefault(step, []).append(launch)
    return groups


def rows(case: TrafficCase) -> list[StepTraffic]:
    compulsory = case.compulsory()
    forward, backward = case.run()
    return [
        StepTraffic(
            case=case,
            step=step,
            kernels=tuple(launch.kernel if launch.counted else f"({launch.kernel})" for launch in launches),
            read=sum(launch.total("bytes_loaded") for launch in launches),
            needed=sum(launch.total("bytes_needed") for launch in launches),
            written=sum(launch.total("bytes_stored") for launch in launches),
            compulsory=sum(compulsory[step]),
        )
        for step, launches in (by_step(forward) | by_step(backward)).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    messages = Console(stderr=True)
    shapes = options.shape or SHAPES
    cases = [
        TrafficCase(M, K, N, r, dtype, options.dropout, form, target=scaled_target(M, K))
        for M, K, N in shapes
        for form in options.form
        for dtype in options.dtype
        for r in options.rank
    ]
    measured = [(case, rows(case)) for case in track(cases, "counting", console=messages)]
    if options.json:
        json.dump([_as_dict(row) for _, counts in measured for row in counts], sys.stdout, indent=1)
    else:
        _print_tables(measured)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.traffic_report",
        description="Run the kernels of fastlora under Triton's interpreter, count every load and store, and compare each step "
        "with the traffic that it cannot avoid. Shapes and the number of multiprocessors are scaled down together.",
    )
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="M,K,N", help="x (M, K), W (N, K) (default: three)")
    parser.add_argument("--rank", nargs="+", type=_positive, default=[16], help="default: 16")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of x and W; after '+', of A and B")
    parser.add_argument("--dropout", type=_rate, default=0.1, help="probability (default: 0.1)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="of the steps (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _rate(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def _shape(text: str) -> tuple[int, int, int]:
    M, K, N = map(_positive, text.split(","))
    return M, K, N


# argparse names a bad value by its type's name.
_positive.__name__, _rate.__name__, _shape.__name__ = "whole number of at least 1", "probability", "shape M,K,N"


def _as_dict(row: StepTraffic) -> dict[str, object]:
    fields = dataclasses.asdict(row)
    return fields.pop("case") | fields | {"ratio": row.ratio, "requested_ratio": row.requested_ratio}


def _print_tables(measured: Sequence[tuple[TrafficCase, Sequence[StepTraffic]]]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_A_FILE)
    for case, counts in measured:
        operands = f"x ({case.M}, {case.K}), W ({case.N}, {case.K}), r = {case.r}, {case.dtype}, p = {case.dropout_p:g}"
        table = Table(title=f"{case.form}: {operands}, {case.target.sms} multiprocessors, Triton {triton.__version__}")
        table.add_column("step")
        table.add_column("launches")
        for number in ("read", "needed", "written", "compulsory", "ratio", "requested"):
            table.add_column(number, justify="right")
        for row in counts:
            table.add_row(*_cells(row))
        console.print(table)
    console.print(
        "KiB at scaled-down shapes: only the ratios carry over to full size. read: all loads, also what GEMM tiles read again "
        "from L2; needed: each byte once per launch; compulsory: each operand of the step once; ratio: (needed + written) / "
        "compulsory, above 1 through partial sums, second passes and LoRA terms written apart; requested: (read + written) / "
        "compulsory. A launch in parentheses is an operation of torch, counted with each operand once."
    )


def _cells(row: StepTraffic) -> list[str]:
    sizes = (f"{size / 1024:,.1f}" for size in (row.read, row.needed, row.written, row.compulsory))
    return [row.step, " ".join(row.kernels), *sizes, f"{row.ratio:.2f}", f"{row.requested_ratio:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
