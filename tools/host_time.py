"""CPU time of a call without the work of its kernels.  No GPU is needed.  `python -m tools.host_time --help`

fastlora's launches go through Triton's own C launcher and end in a stub of libcuda, which counts them and runs nothing.  The
matrix products of torch run on the CPU: cuBLAS has no stub.  The inputs are so small that one takes a microsecond.  Eager LoRA
and PEFT run all their operations on the CPU, through torch's dispatcher.  So neither side has the time of a GPU's driver,
which each kernel of either side adds; `launch_ms` of `pytest benches` includes it.  "at 4096" is the fused form with
in = out = 4096, 512 rows and bfloat16, where sums of partial results add launches and no product runs on the CPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastlora import backends, lora_linear, oracle
from fastlora.benchmark.providers import Provider, of_call, providers_for
from fastlora.benchmark.trial import draw, trained
from fastlora.kernels import steps as kernel_steps
from tools.cases import TARGETS
from tools.stub_driver import Unavailable, stub_gpu

SMALL, LARGE, RANK = (16, 64, 64), (512, 4096, 4096), 16  # (rows, in, out)
BATCH = 2  # x is (batch, sequence, in), as in a transformer
CALLS = 20  # per timing: long against the resolution of the clock


@dataclass(frozen=True)
class Timed:
    """seconds of CPU time per call (the median), and Triton launches per call."""

    seconds: float
    launches: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Time and print.  Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.host_time", description=__doc__)
    parser.add_argument("-p", "--dropout", type=float, default=0.1, help="dropout rate (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each provider, taken in turn (default: 50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        results = measure(options.dropout, options.rounds)
    except Unavailable as reason:
        print(f"host time is not measured: {reason}", file=sys.stderr)
        return 0
    if options.json:
        json.dump(
            {name: {step: vars(timed) for step, timed in steps.items()} for name, steps in results.items()},
            sys.stdout,
            indent=1,
        )
        return 0
    title = f"µs of CPU time / Triton launches, {SMALL[0]} rows, in = out = {SMALL[1]}, r = {RANK}, p = {options.dropout:g}"
    table = Table(title=title)
    for column in ("provider", "forward", "forward + backward"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for name, steps in results.items():
        table.add_row(name, *(f"{timed.seconds * 1e6:.0f} / {timed.launches}" for timed in steps.values()))
    Console().print(table)
    return 0


def measure(dropout_p: float, rounds: int) -> dict[str, dict[str, Timed]]:
    """provider -> {"forward", "forward + backward"} -> what a call takes, from `rounds` timings of each in turn.

    Raises:
        Unavailable: there is no C compiler for the stub, or the process has loaded a real libcuda.
    """
    device = torch.device("cpu")
    torch.set_num_threads(1)
    small = oracle.Case(SMALL, RANK, dropout_p=dropout_p, bias=False)
    large = replace(small, shape=LARGE, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    providers = [(rival, small) for rival in providers_for(small, device) if rival.name in ("eager LoRA", "PEFT")]
    backends = {"fastlora fused": "fused", "fastlora addmm": "addmm", "fastlora": "triton", "fastlora fused at 4096": "fused"}
    for name, backend in backends.items():
        case = large if name.endswith("4096") else small
        providers.append((Provider(name, of_call(partial(lora_linear, backend=backend))), case))
    steps = {(rival.name, name): step for rival, case in providers for name, step in _steps(rival, case).items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    launches: dict[tuple[str, str], int] = {}
    with launches_on_a_stub() as stub:
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for key, step in steps.items():
                step()
                start, before = time.process_time(), stub.stub_launches()
                for _ in range(CALLS):
                    step()
                times[key].append((time.process_time() - start) / CALLS)
                launches[key] = (stub.stub_launches() - before) // CALLS
    results: dict[str, dict[str, Timed]] = {}
    for (provider, name), seconds in times.items():
        results.setdefault(provider, {})[name] = Timed(statistics.median(seconds), launches[provider, name])
    return results


def _steps(provider: Provider, case: oracle.Case) -> dict[str, Callable[[], object]]:
    drawn = draw(case, torch.device("cpu"))
    x = drawn.x.detach().view(BATCH, -1, case.shape[1]).requires_grad_()
    inputs = replace(drawn, x=x, dy=drawn.dy.view(BATCH, -1, case.shape[2]))
    forward = provider.bind(inputs.weights, case.scaling, case.dropout_p)
    leaves = trained(provider, inputs)
    return {
        "forward": lambda: forward(inputs.x),
        "forward + backward": lambda: torch.autograd.grad(forward(inputs.x), leaves, inputs.dy),
    }


@contextmanager
def launches_on_a_stub() -> Iterator[Any]:
    """Inside, launches of the package take tensors of the CPU, as an H200 would its own, and run nothing.  Yields the stub."""
    target = TARGETS[90]
    with (
        stub_gpu(target.capability) as stub,
        patch.object(backends, "INTERPRETING", True),
        patch.object(kernel_steps, "target_of", lambda device: target),
    ):
        yield stub


if __name__ == "__main__":
    sys.exit(main())
