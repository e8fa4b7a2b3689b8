"""CPU time of a call without its kernels.  No GPU is needed.  `python -m tools.host_time --help`

The inputs are so small that a matrix product takes a microsecond, and Triton launches do nothing.  What remains of fastlora's
time is its Python code, autograd, the operators and the GEMM calls of torch.  Eager LoRA and PEFT run all their operations.
On a GPU every launch adds time on both sides: `launch_ms` of `pytest benches` includes it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when kernels are imported; launches then take CPU tensors

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastlora import lora_linear, oracle
from fastlora.benchmark.providers import Provider, of_call, providers_for
from fastlora.benchmark.trial import draw, trained
from fastlora.kernels import launch as launching

BATCH, SEQUENCE, IN, OUT, RANK = 2, 8, 64, 64, 16  # x is (batch, sequence, in), as in a transformer
CALLS = 20  # per timing: long against the resolution of the clock


def main(arguments: Sequence[str] | None = None) -> int:
    """Time and print.  Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.host_time", description=__doc__)
    parser.add_argument("-p", "--dropout", type=float, default=0.1, help="dropout rate (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each provider, taken in turn (default: 50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    results = measure(options.dropout, options.rounds)
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        return 0
    table = Table(title=f"µs of CPU time per call, x {BATCH, SEQUENCE, IN}, r = {RANK}, p = {options.dropout:g}, float32")
    for column in ("provider", "forward", "forward + backward"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for name, times in results.items():
        table.add_row(name, *(f"{seconds * 1e6:.0f}" for seconds in times.values()))
    Console().print(table)
    return 0


def measure(dropout_p: float, rounds: int) -> dict[str, dict[str, float]]:
    """provider -> {"forward", "forward + backward"} -> seconds of CPU time per call: the median of `rounds` timings."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    case = oracle.Case((BATCH * SEQUENCE, IN, OUT), RANK, dropout_p=dropout_p, bias=False)
    eager = [rival for rival in providers_for(case, device) if rival.name in ("eager LoRA", "PEFT")]
    backends = {"fastlora fused": "fused", "fastlora addmm": "addmm", "fastlora": "triton"}
    forms = [Provider(name, of_call(partial(lora_linear, backend=backend))) for name, backend in backends.items()]
    steps = {(rival.name, name): step for rival in eager + forms for name, step in _steps(rival, case).items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    with launches_doing_nothing():
        for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
            for key, step in steps.items():
                step()
                start = time.process_time()
                for _ in range(CALLS):
                    step()
                times[key].append((time.process_time() - start) / CALLS)
    results: dict[str, dict[str, float]] = {}
    for (provider, name), seconds in times.items():
        results.setdefault(provider, {})[name] = statistics.median(seconds)
    return results


def _steps(provider: Provider, case: oracle.Case) -> dict[str, Callable[[], object]]:
    drawn = draw(case, torch.device("cpu"))
    x = drawn.x.detach().view(BATCH, SEQUENCE, IN).requires_grad_()
    inputs = replace(drawn, x=x, dy=drawn.dy.view(BATCH, SEQUENCE, OUT))
    forward = provider.bind(inputs.weights, case.scaling, case.dropout_p)
    leaves = trained(provider, inputs)
    return {
        "forward": lambda: forward(inputs.x),
        "forward + backward": lambda: torch.autograd.grad(forward(inputs.x), leaves, inputs.dy),
    }


@contextmanager
def launches_doing_nothing() -> Iterator[None]:
    """Inside, launches of the package do nothing."""
    launch = launching.launch
    launching.launch = lambda plan, *args: None
    try:
        yield
    finally:
        launching.launch = launch


if __name__ == "__main__":
    sys.exit(main())
