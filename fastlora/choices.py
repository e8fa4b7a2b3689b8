"""Which form a step takes on this GPU: what was measured, where it was, else what arithmetic says."""

import functools

from fastlora.kernels.forms import Choice, Problem, default_choice
from fastlora.kernels.target import Target


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, target: Target) -> Choice:
    """The form of one step."""
    return default_choice(problem, target)
