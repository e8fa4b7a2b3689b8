"""Timing LoRA linears side by side, every provider held against float64 before it is timed.

clock.py       `measure`: interleaved callables, device time, medians; also what `fastlora tune` times with
providers.py  who is compared; baselines.py: what others do
trial.py       one size, every provider: checked, timed, bytes counted
memory.py      bytes saved for backward, peak memory
ceilings.py    what the machine can do, and the least time a pass could take
shapes.py      the linears of well-known models
results.py     rows, conditions, files; plot.py: bars
"""

from fastlora.benchmark.ceilings import Ceilings, measure_ceilings
from fastlora.benchmark.clock import (
    CudaClock,
    Prepared,
    Quantiles,
    Step,
    copies_beyond_cache,
    device_clock,
    measure,
    quantiles,
    timed_launches,
)
from fastlora.benchmark.memory import peak_bytes, saved_bytes
from fastlora.benchmark.providers import Provider, Weights, providers_for
from fastlora.benchmark.trial import PASSES, Inputs, Measurement, WrongResultError, draw, run, verify

__all__ = [
    "PASSES",
    "Ceilings",
    "CudaClock",
    "Inputs",
    "Measurement",
    "Prepared",
    "Provider",
    "Quantiles",
    "Step",
    "Weights",
    "WrongResultError",
    "copies_beyond_cache",
    "device_clock",
    "draw",
    "measure",
    "measure_ceilings",
    "peak_bytes",
    "providers_for",
    "quantiles",
    "run",
    "saved_bytes",
    "timed_launches",
    "verify",
]
