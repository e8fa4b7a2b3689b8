"""Timing LoRA linears side by side: the frozen linear alone, eager LoRA, fastlora.

What is compared must be comparable.  Every contender gets the same random tensors; each is held against the float64 oracle,
with the mask that it drew itself, before any is timed; all are warmed up before the first is timed; and each timed round visits
all of them, in another order, so that a machine that slows down slows them alike.  Reported are the median and the 20th and
80th percentile.

Bytes saved for backward are counted where autograd saves them: each storage once, parameters left out.  Peak memory is what
torch's allocator held at most during forward + backward, above what it held before.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import __version__, dropout, oracle
from fastlora.functional import lora_linear

PASSES = ("forward", "forward + backward")
WARMUP = 3  # untimed rounds
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU so far


def frozen_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: float) -> Tensor:
    """y = x Wᵀ + bias: the floor."""
    return F.linear(x, weight, bias)


def eager_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """`peft.tuners.lora.layer.Linear.forward` in training mode: torch's dropout, two linears, one add, one cast."""
    base = F.linear(x, weight, bias)
    dropped = F.dropout(x.to(lora_A.dtype), dropout_p) if dropout_p > 0 else x.to(lora_A.dtype)
    return (base + F.linear(F.linear(dropped, lora_A), lora_B) * scaling).to(base.dtype)


def _torch_mask(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The mask that F.dropout draws for x in `dtype`."""

    def mask(rows: int, cols: int, p: float, *, device: torch.device) -> Tensor:
        return F.dropout(torch.ones(rows, cols, dtype=dtype, device=device), p) != 0

    return mask


def _torch_keep_scale(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def fastlora_mask(rows: int, cols: int, p: float, *, device: torch.device) -> Tensor:
    """The mask that lora_linear takes when it draws its own seed."""
    return dropout.dropout_mask(dropout.draw_seed(device), rows, cols, p)


@dataclass(frozen=True)
class Contender:
    """A way to compute the linear: call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p) -> y.

    `call` draws its mask from torch's default generator, as in training.  `mask(rows, cols, p, device=...)`, run from the same
    state of the generator, is the mask that it drew, and `keep_scale(p)` the factor on kept elements: with both, the very
    callable that is timed can be judged.  `adapted` is False for the frozen linear alone, which is y = x Wᵀ + bias.
    """

    name: str
    call: Callable[..., Tensor]
    mask: Callable[..., Tensor] = fastlora_mask
    keep_scale: Callable[[float], float] = dropout.keep_scale
    adapted: bool = True

    @property
    def gradients(self) -> tuple[str, ...]:
        return ("dx", "dA", "dB") if self.adapted else ("dx",)


@dataclass
class Measurement:
    """What was measured of one contender: seconds of each timed run by pass, and bytes."""

    contender: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})
    saved_bytes: int = 0
    peak_bytes: int = 0

    def quantiles(self, name: str) -> tuple[float, float, float]:
        """20th percentile, median, 80th percentile of a pass, in seconds."""
        times = self.seconds[name]
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        return fifths[0], statistics.median(times), fifths[3]


class WrongResultError(RuntimeError):
    """A contender's result is further from float64 than the oracle allows, so there is nothing to time."""


def contenders(case: oracle.Case, backend: str | None = None) -> list[Contender]:
    """The frozen linear, eager LoRA as PEFT computes it, and `fastlora.lora_linear` on `backend`."""
    return [
        Contender("frozen linear", frozen_linear, adapted=False),
        Contender("eager LoRA", eager_lora, _torch_mask(case.adapters), _torch_keep_scale),
        Contender("fastlora", partial(lora_linear, backend=backend)),
    ]


def verify(contender: Contender, case: oracle.Case, device: torch.device) -> list[oracle.Row]:
    """Hold the contender against the oracle on `case` and return the rows.

    Raises:
        WrongResultError: an error over its bound, with the table of all of them.
    """

    def call(*tensors: Tensor | None, scaling: float, dropout_p: float, seed: int) -> Tensor:
        with _seeded(seed, device):
            return contender.call(*tensors, scaling=scaling, dropout_p=dropout_p)

    def mask(seed: int, rows: int, cols: int, p: float, device: torch.device) -> Tensor:
        with _seeded(seed, device):
            return contender.mask(rows, cols, p, device=device)

    if not contender.adapted:
        case = replace(case, scaling=0.0, dropout_p=0.0)
    expected = oracle.masked_reference(mask, contender.keep_scale)
    rows = oracle.check(case, call, device=device, outputs=("y", *contender.gradients), expected=expected)
    if not all(row.passed for row in rows):
        raise WrongResultError(f"{contender.name} is wrong on {case}, so it is not timed:\n{oracle.table(rows)}")
    return rows


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def measure(
    rivals: Iterable[Contender],
    case: oracle.Case,
    device: torch.device,
    *,
    repeats: int,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Time forward and forward + backward of every contender on the case's inputs, bias frozen, and count their bytes.

    progress: called with what was just done: len(rivals) + WARMUP + repeats times.

    Raises:
        WrongResultError: before anything is timed, when a contender's result is wrong.
    """
    rivals = list(rivals)
    for contender in rivals:
        verify(contender, case, device)
        progress(f"checked {contender.name}")
    inputs = oracle.draw(case, device=device)
    measurements = {contender.name: Measurement(contender.name) for contender in rivals}
    steps = {(contender.name, name): prepare(contender, case, inputs, name) for contender in rivals for name in PASSES}
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    for round_ in range(WARMUP):
        clock(steps)
        progress(f"warm-up {round_ + 1} of {WARMUP}")
    for round_ in range(repeats):
        order = random.Random(round_).sample(list(steps), len(steps))
        for (contender_name, pass_name), seconds in clock({key: steps[key] for key in order}).items():
            measurements[contender_name].seconds[pass_name].append(seconds)
        progress(f"round {round_ + 1} of {repeats}")
    parameters = [inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias]  # they live, saved or not
    for contender in rivals:
        measurement = measurements[contender.name]
        measurement.saved_bytes = saved_bytes(steps[contender.name, PASSES[0]], parameters)
        measurement.peak_bytes = peak_bytes(steps[contender.name, PASSES[1]], device)
    return list(measurements.values())


def prepare(contender: Contender, case: oracle.Case, inputs: oracle.Inputs, name: str) -> Callable[[], object]:
    """The pass `name` of the contender on `inputs`, ready to run; x, A and B are trained, or x alone for the frozen linear."""
    leaves = {argument: getattr(inputs, argument) for argument in ("x", "weight", "lora_A", "lora_B", "bias")}
    trained = [oracle.ARGUMENT_OF[gradient] for gradient in contender.gradients]
    for argument in trained:
        leaves[argument] = leaves[argument].detach().requires_grad_()
    forward = partial(contender.call, *leaves.values(), scaling=case.scaling, dropout_p=case.dropout_p)
    if name == PASSES[0]:
        return forward
    return lambda: torch.autograd.grad(forward(), [leaves[argument] for argument in trained], inputs.dy)


Steps = Mapping[tuple[str, str], Callable[[], object]]


def _cpu_clock(steps: Steps) -> dict[tuple[str, str], float]:
    seconds = {}
    for key, step in steps.items():
        start = time.perf_counter()
        step()
        seconds[key] = time.perf_counter() - start
    return seconds


def _cuda_clock(device: torch.device) -> Callable[[Steps], dict[tuple[str, str], float]]:
    """Seconds between CUDA events; L2 is overwritten before each step, which also keeps the queue ahead of the host."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(steps: Steps) -> dict[tuple[str, str], float]:
        events = {}
        with torch.cuda.device(device):  # events are recorded on the current device's stream
            for key, step in steps.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                step()
                end.record()
                events[key] = start, end
        torch.cuda.synchronize(device)
        return {key: start.elapsed_time(end) / 1e3 for key, (start, end) in events.items()}

    return clock


def saved_bytes(forward: Callable[[], object], kept_out: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that autograd saves for backward in forward(), each once, without those of `kept_out`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in kept_out if tensor is not None}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # keeps the graph, and with it the storages, alive: no address is used twice
    del result
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held for `device` while step() ran, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for event in sorted(_cpu_allocations(step), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _cpu_allocations(step: Callable[[], object]) -> list[dict]:
    """Every allocation and release of torch's CPU allocator during step(), as the profiler's trace events."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event.get("name") == "[memory]"]


def environment(device: torch.device) -> dict[str, str | int]:
    """What a timing depends on besides the code."""
    import triton

    known = {"fastlora": __version__, "torch": torch.__version__, "triton": triton.__version__}
    known["python"] = platform.python_version()
    if device.type == "cuda":
        return {**known, "device": torch.cuda.get_device_name(device)}
    return {**known, "device": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
