"""NaN and infinity in one element of one input reach the outputs as in eager PyTorch, and a dropped one does not leak."""

import math
import random
from functools import partial

import pytest
import torch
from torch import Tensor

from fastlora import dropout_mask, lora_linear, oracle
from fastlora.oracle import Case

VALUES = (math.nan, math.inf, -math.inf)
INPUTS = ("x", "dy", "weight", "lora_A", "lora_B", "bias")


def poisoned(case: Case, name: str, value: float, source: random.Random) -> oracle.Inputs:
    """Random inputs with `value` in one element of one of them; in half of the calls with dropout, a dropped one of x."""
    inputs = oracle.draw(case)
    tensor = getattr(inputs, name).flatten()
    places = torch.arange(tensor.numel())
    if name == "x" and case.dropout_p and source.random() < 0.5:
        dropped = ~dropout_mask(inputs.seed, *inputs.x.shape, case.dropout_p).flatten()
        places = places[dropped] if dropped.any() else places
    tensor[source.choice(places.tolist())] = value
    return inputs


def kinds(tensor: Tensor, *, infinity: int = 1) -> Tensor:
    """0 finite, `infinity` infinite, 2 NaN."""
    return tensor.isinf().int() * infinity + 2 * tensor.isnan().int()


def lost(case: Case, output: str, ours: Tensor, eager: Tensor, ref: Tensor) -> bool:
    """Whether what is finite in eager is less accurate than eager; of a few elements, which may cancel, nothing can be said."""
    finite = eager.isfinite() & ref.isfinite() & ours.isfinite()
    if int(finite.sum()) < oracle.POOLED_ELEMENTS:
        return False
    return not oracle.judge(case, output, *(t[finite] for t in (ours, eager, ref))).passed


@pytest.mark.parametrize(("backend", "full"), [("torch", 5_000), ("fused", 250), ("addmm", 250)])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["without dropout", "dropout"])
def test_not_finite(backend: str, full: int, p: float, counted) -> None:
    source, expected, failed, seen = random.Random(1), oracle.masked_reference(), [], 0
    for seed in counted(full):
        dtype, adapters = source.choice([pair for pair in oracle.FLOOR if torch.float64 not in pair])
        shape = tuple(source.choice((1, 3, 16, 17, 33, 65)) for _ in range(3))
        case = Case(shape, source.choice((1, 3, 8)), dtype, adapters, dropout_p=p, scaling=0.7, seed=seed)
        name, value = source.choice(INPUTS), source.choice(VALUES)
        inputs = poisoned(case, name, value, source)
        refs, eager = (oracle.evaluate(expected, case, given, case.outputs) for given in (inputs.double(), inputs))
        ours = oracle.evaluate(partial(lora_linear, backend=backend), case, inputs, case.outputs)
        seen += any(not t.isfinite().all() for t in eager.values())
        infinity = 2 if backend != "torch" and dtype != adapters else 1  # hi + lo of an infinity is a NaN
        for output in case.outputs:
            found = ours[output], eager[output], refs[output]
            if not torch.equal(*(kinds(t, infinity=infinity) for t in found[:2])):
                failed.append(f"{value} in {name}, {case}, seed {seed}: other elements of {output} are not finite")
            if lost(case, output, *found):
                failed.append(f"{value} in {name}, {case}, seed {seed}: the finite elements of {output} are wrong")
    print(f"{seen} of them not finite in eager", end="")
    assert seen
    assert not failed, "\n".join([f"{len(failed)} outputs differ", *failed[:20]])
