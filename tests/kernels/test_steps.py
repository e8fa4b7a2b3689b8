"""steps.py: choices, what backward gives when operands are missing, and memory that the caller provides."""

from itertools import product

import pytest
import torch
from planned import AMPERE, assert_close

from fastlora import oracle
from fastlora.kernels import steps
from fastlora.kernels.target import INTERPRETER

TILE = "128,256,64,32,8,3,8"
NAMES = ("x", "weight", "lora_A", "lora_B", "S")


@pytest.mark.parametrize("rank", [4, 40])  # dS and dB in one pass, each in its own
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("choice", [*steps.FORMS, "fused/64,64,16,16,8,2,8"])
def test_missing_operands_and_out(choice, dropout_p, rank):
    """A gradient is None where one of its operands is missing, else right, whatever else is missing.

    `out` is written in place and returned, and holds what a call without it returns.
    """
    case = oracle.Case((21, 40, 24), rank, dropout_p=dropout_p)
    t = oracle.draw(case)
    exact = oracle.evaluate(oracle.masked_reference(), case, t.double(), case.outputs)
    options = torch.tensor([t.seed]) if dropout_p else None, case.scaling, dropout_p
    operands = t.x, t.weight, t.lora_A, t.lora_B
    y, S = steps.forward(*operands, t.bias, *options, out := torch.empty_like(t.dy), choice=choice)
    assert y is out
    assert all(map(torch.equal, (y, S), steps.forward(*operands, t.bias, *options, choice=choice)))
    assert_close(y, exact["y"], torch.float32)
    for given in product((True, False), repeat=len(NAMES)):
        has = dict(zip(NAMES, given, strict=True))
        call = [tensor if there else None for tensor, there in zip((*operands, S), given, strict=True)]
        call = [t.dy, *call, *options, torch.float32]
        gradients = steps.backward(*call, out := torch.full_like(t.x, torch.nan), choice=choice)
        there = has["weight"] and has["lora_A"] and has["lora_B"], has["x"] and has["lora_B"], has["S"]
        assert tuple(gradient is not None for gradient in gradients) == there, has
        assert gradients[0] is (out if there[0] else None)
        for name, gradient in zip(("dx", "dA", "dB"), gradients, strict=True):
            if gradient is not None:
                assert_close(gradient, exact[name], torch.float32)
        if all(given):
            assert all(map(torch.equal, gradients, steps.backward(*call, choice=choice)))


@pytest.mark.parametrize(
    ("choice", "expected"), [("addmm", (False, None)), ("fused", (True, None)), (f"fused/{TILE}", (True, TILE))]
)
def test_choices(choice, expected):
    fused, tile = steps.parse_choice(choice, torch.bfloat16, "ieee", INTERPRETER)
    assert (fused, tile and str(tile)) == expected


@pytest.mark.parametrize(
    ("choice", "target", "message"),
    [
        ("torch", INTERPRETER, r'choice must be one of .*"fused/<tile>", got \'torch\''),
        (f"addmm/{TILE}", INTERPRETER, "choice must be one of"),
        ("fused/128", INTERPRETER, f"'128' is no tile for torch.bfloat16 on this GPU, expected one of {TILE}, "),
        (f"fused/{TILE}", AMPERE, "is no tile for torch.bfloat16 on this GPU"),
    ],
)
def test_bad_choices(choice, target, message):
    with pytest.raises(ValueError, match=message):
        steps.parse_choice(choice, torch.bfloat16, "ieee", target)
