"""What `fastlora parity --function module:name` checks: a list of cases, on which what the function raises is a verdict too."""

import importlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastlora import oracle

#: What is compared; the bias is frozen.
OUTPUTS = ("y", "dx", "dA", "dB")
#: (shape, rank, p, bias) in each dtype: ragged, no dropout, exact tiles, all dropped, no row.
SIZES = (
    ((17, 33, 65), 3, 0.1, True),
    ((40, 24, 200), 33, 0.0, False),
    ((64, 128, 96), 16, 0.5, False),
    ((20, 48, 30), 8, 1.0, True),
    ((0, 64, 48), 4, 0.1, True),
)
#: In float32 and float64 alone: the oracle draws so small a 16-bit case up to 256 times.
TINY = (((1, 1, 1), 1, 0.5, True), ((2, 5, 3), 2, 0.0, False))


def load(path: str) -> Callable[..., Any]:
    """The function "module:name"; the current folder comes first in the search for the module.

    Raises:
        ValueError: not such a string, no such module, no such name in it, or nothing that can be called.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"--function must be MODULE:NAME, my_kernels:lora_linear say, got {path!r}")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--function: there is no module {error.name!r} in this folder or the Python path") from error
    except AttributeError as error:
        raise ValueError(f"--function: {error}") from error
    if not callable(function):
        raise ValueError(f"--function: {path} must be a function, got {type(function).__name__}")
    return function


def cases(dtypes: Iterable[tuple[torch.dtype, torch.dtype]], seed: int) -> list[oracle.Case]:
    """Every size in each pair of (base dtype, adapter dtype)."""
    return [
        oracle.Case(shape, rank, *pair, bias=bias, dropout_p=p, seed=seed)
        for pair in dtypes
        for shape, rank, p, bias in (*SIZES, *(TINY if pair[0].itemsize > 2 else ()))
    ]


def check(case: oracle.Case, function: Callable[..., Any], device: torch.device) -> list[oracle.Row]:
    """The verdicts on OUTPUTS.  Where gradients cannot be computed, y is judged alone."""

    def called(*tensors: Any, **options: Any) -> torch.Tensor:
        y = function(*tensors, **options)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"the function returned {type(y).__name__}, expected a tensor")
        return y

    def verdicts(outputs: tuple[str, ...]) -> list[oracle.Row]:
        try:
            return oracle.check(case, called, device=device, outputs=outputs)
        except Exception as error:  # a user's function may raise anything
            note = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            rows = verdicts(outputs[:1]) if len(outputs) > 1 else []
            floors = {output: oracle.FLOOR[case.dtype, case.dtype_of(output)] for output in outputs[len(rows) :]}
            return rows + [oracle.Row(case, output, math.inf, math.nan, floor, note) for output, floor in floors.items()]

    return verdicts(OUTPUTS)
