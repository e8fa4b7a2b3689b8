"""Times LoRA linears side by side. Every provider is checked against float64 before it is timed.

clock.py       `measure`: interleaved steps, device time; `fastlora tune` uses it too
providers.py   what is compared
trial.py       one size, all providers: check, time, count bytes
memory.py      bytes saved for backward, peak memory
launches.py    what a GPU is given to run
ceilings.py    what the machine reaches, and the least time a pass could take
results.py     the rows of a linear, as a CSV file and as a plot
"""

from fastlora.benchmark.memory import saved_bytes
from fastlora.benchmark.trial import PASSES, WrongResultError, run

__all__ = ["PASSES", "WrongResultError", "run", "saved_bytes"]
