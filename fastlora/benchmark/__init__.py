"""Times LoRA linears side by side. Every provider is checked against float64 before it is timed.

clock.py       `measure`: interleaved steps, device time; `fastlora tune` uses it too
providers.py   what is compared; baselines.py: other implementations
trial.py       one size, all providers: check, time, count bytes
memory.py      bytes saved for backward, peak memory
ceilings.py    what the machine reaches, and the least time a pass could take
results.py     rows and their files; plot.py: bar charts
"""

from fastlora.benchmark.memory import saved_bytes
from fastlora.benchmark.trial import PASSES, Measurement, WrongResultError, run

__all__ = ["PASSES", "Measurement", "WrongResultError", "run", "saved_bytes"]
