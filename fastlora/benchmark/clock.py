"""Timing callables side by side, so that their times can be compared.

    measure({"ours": ours, "theirs": theirs}, device, repeats=20)    # {"ours": [seconds, ...], "theirs": [...]}

All steps are warmed up before the first is timed.  Each round times all of them, in another order, so that a machine that
slows down affects them alike.  On a GPU the clock is a pair of CUDA events.  Before the first event the device waits for as
long as the host took to launch the step last time, so the events enclose the device's work without gaps between launches.
`CudaClock.launches` holds the time that launching took.

Training does not find its data in the cache: let steps take their inputs in turn from `copies_beyond_cache(...)` sets.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

WARMUP = 3  # untimed rounds
FEWEST_ROUNDS = 5  # despite a time limit

_CYCLES_PER_SECOND = 2e9  # no GPU's clock is much faster
_LEAD = 1.5  # the device waits for this multiple of the host's time
_LONGEST_LEAD = 0.01  # seconds
_FALLBACK_CACHE = 64 << 20  # bytes, where the machine does not report its cache
_CPU_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_MOST_COPIES = 32  # with smaller data, launches take longer than memory

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Prepared:
    """A step in two halves, run(setup()); only `run` is timed.  A backward pass, for example."""

    setup: Callable[[], Any]
    run: Callable[[Any], object]

    def __call__(self) -> object:
        return self.run(self.setup())


Step = Callable[[], object]
Clock = Callable[[Hashable, Prepared], float]  # (name, step) -> seconds of the step's run


class Quantiles(NamedTuple):
    """Of a list of times, in the same unit."""

    p20: float
    median: float
    p80: float


def quantiles(times: list[float]) -> Quantiles:
    """20th percentile, median and 80th percentile; `times` must not be empty."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return Quantiles(fifths[0], statistics.median(times), fifths[3])


def measure(
    steps: Mapping[Name, Step],
    device: torch.device,
    repeats: int,
    *,
    limit: float = math.inf,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[Name, list[float]]:
    """Seconds of every step in each round, by name.

    Args:
        steps: what to time; of a `Prepared` step only its second half.
        device: where the steps compute.
        repeats: timed rounds, after WARMUP untimed ones.
        limit: no round begins later than this many seconds after the first, except the first FEWEST_ROUNDS.
        clock: default `device_clock(device)`.
        progress: called with what was just done, after each round.
    """
    clock = clock or device_clock(device)
    prepared = {name: step if isinstance(step, Prepared) else _whole(step) for name, step in steps.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    restore = gc.enable if gc.isenabled() else gc.disable
    gc.collect()
    gc.disable()
    try:
        for round_ in range(WARMUP):
            for name, step in prepared.items():
                clock(name, step)
            progress(f"warm-up {round_ + 1} of {WARMUP}")
        start = time.perf_counter()
        for round_ in range(repeats):
            if round_ >= FEWEST_ROUNDS and time.perf_counter() - start > limit:
                break
            for name in random.Random(round_).sample(list(prepared), len(prepared)):
                seconds[name].append(clock(name, prepared[name]))
            progress(f"round {round_ + 1} of {repeats}")
    finally:
        restore()
    return seconds


def _whole(step: Step) -> Prepared:
    return Prepared(lambda: None, lambda _: step())


def device_clock(device: torch.device) -> Clock:
    """CUDA events on a GPU, wall time on a CPU."""
    return CudaClock(device) if device.type == "cuda" else _cpu_clock


def _cpu_clock(name: Hashable, step: Prepared) -> float:
    prepared = step.setup()
    start = time.perf_counter()
    step.run(prepared)
    return time.perf_counter() - start


class CudaClock:
    """Seconds between CUDA events around a step's run; `launches` has the host's seconds for each call, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: dict[Hashable, list[float]] = {}

    def __call__(self, name: Hashable, step: Prepared) -> float:
        launches = self.launches.setdefault(name, [])
        with torch.cuda.device(self.device):  # events are recorded on the current device's stream
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepared = step.setup()
            lead = min(_LEAD * launches[-1], _LONGEST_LEAD) if launches else 0.0
            torch.cuda._sleep(int(lead * _CYCLES_PER_SECOND))
            begin.record()
            start = time.perf_counter()
            step.run(prepared)
            launches.append(time.perf_counter() - start)
            end.record()
            torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` bytes to take in turn so that each has left the last-level cache before its next turn."""
    return min(max(2, math.ceil(2 * cache_bytes(device) / max(nbytes, 1))), _MOST_COPIES)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: a GPU's L2, the largest that Linux reports for the first CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or _FALLBACK_CACHE
    kilobytes = [int(file.read_text().strip().removesuffix("K")) for file in Path(_CPU_CACHES).glob("index*/size")]
    return max(kilobytes, default=_FALLBACK_CACHE >> 10) << 10
