"""The sizes that a suite run measures, the most important first.

On a GPU the centre is M = 8192, r = 16, p = 0.1 in bfloat16; its linear is the square one of Llama-3.1-8B, K = N = 4096.

    quick       the linears of Llama-3.1-8B at the centre; the centre with one of M, r, p, adapters' dtype changed
    full        every linear of every model at the centre; the centre with few rows, at every p; the centre's linear at every
                M, r, p and adapters' dtype; every linear at every M
    everything  all combinations, and the centre with few rows

Decoding and short sequences have few rows, and launching may then take longer than the device; `launch_ms` shows it.
Compiling takes seconds for each provider and size, so torch.compile is measured at the square linear of each model, at the
centre.  On a CPU: a square linear of 1024 in float32, with dropout and without; full adds the linears of Llama-3.2-1B.
`toy` is for the tests.
"""

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from benches.shapes import MODELS, Linear
from fastlora.oracle import Case

NAMES = ("quick", "full", "everything", "toy")

CENTRE_MODEL = "Llama-3.1-8B"
CENTRE = Case((8192, 4096, 4096), rank=16, dtype=torch.bfloat16, bias=False, dropout_p=0.1)
ROWS = (8192, 16384, 2048, 512)
FEW_ROWS = (1, 16, 128)
RANKS = (16, 8, 64, 128)
DROPOUT = (0.1, 0.0)
ADAPTERS = (torch.bfloat16, torch.float32)
_CENTRE_VALUES = (8192, 16, 0.1, torch.bfloat16)

CPU_CENTRE = Case((2048, 1024, 1024), rank=16, bias=False, dropout_p=0.1)
TOY = Case((96, 64, 80), rank=8, bias=False, dropout_p=0.1)


@dataclass(frozen=True)
class Size:
    """A case, which linears of which models have its shape, and whether providers under torch.compile take part."""

    case: Case
    used_by: str = ""
    compiled: bool = False

    @property
    def id(self) -> str:
        """8192x4096x4096-r16-p0.1-bf16+f32-bias"""
        return str(self.case).replace(" ", "-").replace("=", "")


def sizes(name: str, device: torch.device) -> list[Size]:
    """The grid `name`, one of NAMES, for `device`; no case twice."""
    if name == "toy":
        return [Size(TOY, compiled=True), Size(replace(TOY, dropout_p=0.0))]
    if device.type == "cpu":
        return _unique(_on_cpu(name))
    grid = {"quick": _quick, "full": _full, "everything": _everything}[name]
    return _unique(grid())


def most_important(name: str, device: torch.device) -> list[Size]:
    """The part of the grid that is measured before whole models."""
    return sizes("toy" if name == "toy" else "quick", device)


def _quick() -> Iterable[Size]:
    yield from _linears(CENTRE_MODEL)
    yield from (Size(replace(CENTRE, dropout_p=0.0)), Size(replace(CENTRE, adapter_dtype=torch.float32)))
    yield from (Size(_with_rows(CENTRE, rows)) for rows in (512, 16384, 1, 128))
    yield Size(replace(CENTRE, rank=64))


def _full() -> Iterable[Size]:
    yield from _quick()
    for model in MODELS:
        yield from _linears(model)
    yield from (Size(replace(_with_rows(CENTRE, rows), dropout_p=p)) for rows in FEW_ROWS for p in DROPOUT)
    yield from map(Size, _around(CENTRE))
    for rows in ROWS:
        for model in MODELS:
            yield from _linears(model, rows)


def _everything() -> Iterable[Size]:
    yield from _full()
    for model in MODELS:
        for size in _linears(model):
            yield from (replace(size, case=case, compiled=False) for case in _around(size.case))


def _on_cpu(name: str) -> Iterable[Size]:
    yield from (Size(replace(CPU_CENTRE, dropout_p=p), compiled=p > 0) for p in DROPOUT)
    if name != "quick":
        for linear in MODELS["Llama-3.2-1B"].linears:
            case = replace(CPU_CENTRE, shape=(512, linear.in_features, linear.out_features), bias=linear.bias)
            yield Size(case, _label("Llama-3.2-1B", linear))


def _linears(model: str, rows: int = CENTRE.shape[0]) -> Iterable[Size]:
    """The linears of a model; all else as in the centre."""
    for linear in MODELS[model].linears:
        square = linear.in_features == linear.out_features and not linear.bias
        case = replace(CENTRE, shape=(rows, linear.in_features, linear.out_features), bias=linear.bias)
        yield Size(case, _label(model, linear), compiled=square and rows == CENTRE.shape[0])


def _around(centre: Case) -> Iterable[Case]:
    """Every M, r, p and dtype of the adapters on the linear of `centre`, the most similar cases first."""
    product = itertools.product(ROWS, RANKS, DROPOUT, ADAPTERS)
    for rows, r, p, adapters in sorted(product, key=lambda values: sum(map(operator.ne, values, _CENTRE_VALUES))):
        yield replace(_with_rows(centre, rows), rank=r, dropout_p=p, adapter_dtype=adapters)


def _with_rows(case: Case, rows: int) -> Case:
    return replace(case, shape=(rows, *case.shape[1:]))


def _label(model: str, linear: Linear) -> str:
    return f"{model} {', '.join(linear.names)}"


def _unique(grid: Iterable[Size]) -> list[Size]:
    """Each case once, in the place of its first appearance, with the names and the compiled providers of all of them."""
    found: dict[str, Size] = {}
    for size in grid:
        known = found.setdefault(size.id, size)
        labels = [label for label in dict.fromkeys((*known.used_by.split("; "), size.used_by)) if label]
        found[size.id] = replace(known, used_by="; ".join(labels), compiled=known.compiled or size.compiled)
    return list(found.values())
