"""steps.py: choices, what backward gives when operands are missing, and memory that the caller provides."""

from itertools import product

import pytest
import torch
from planned import AMPERE, assert_close

from fastlora import dropout_mask
from fastlora.dropout import keep_scale
from fastlora.kernels import steps
from fastlora.kernels.target import INTERPRETER

M, K, N = 21, 40, 24
FORMS = (*steps.FORMS, "fused/64,64,16,16,8,2,8")
NAMES = ("x", "weight", "lora_A", "lora_B", "S")


@pytest.fixture(params=[0.0, 0.3], ids="p={}".format)
def dropout_p(request):
    return request.param


@pytest.fixture(params=[4, 40], ids="r={}".format)  # dS and dB in one pass, each in its own
def operands(request):
    r = request.param
    shapes = {"dy": (M, N), "x": (M, K), "weight": (N, K), "lora_A": (r, K), "lora_B": (N, r), "S": (M, r), "bias": (N,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def seed_of(dropout_p):
    return torch.tensor([5]) if dropout_p else None


def exact(operands, scaling, dropout_p):
    """(y, S) and (dx, dA, dB) in float64; backward's S is the one given."""
    dy, x, W, A, B, given, bias = (tensor.double() for tensor in operands.values())
    keep = keep_scale(dropout_p) * dropout_mask(5, M, K, dropout_p)
    S, dS = (keep * x) @ A.t(), scaling * dy @ B
    return (x @ W.t() + bias + scaling * S @ B.t(), S), (
        dy @ W + keep * (dS @ A),
        dS.t() @ (keep * x),
        scaling * dy.t() @ given,
    )


@pytest.mark.parametrize("choice", FORMS)
def test_forward_with_and_without_out(operands, dropout_p, choice):
    """`out` is written in place and returned, and holds what a call without it returns."""
    arguments = [operands[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    call = [*arguments, seed_of(dropout_p), 0.5, dropout_p]
    out = torch.full((M, N), torch.nan)
    y, S = steps.forward(*call, out, choice=choice)
    assert y is out
    assert all(map(torch.equal, (y, S), steps.forward(*call, choice=choice)))
    for result, expected in zip((y, S), exact(operands, 0.5, dropout_p)[0], strict=True):
        assert_close(result, expected, torch.float32)


@pytest.mark.parametrize("choice", FORMS)
def test_backward_with_missing_operands(operands, dropout_p, choice):
    """Every subset of the operands: a gradient is None where one of its operands is missing, else right; dx is in `out`."""
    expected = exact(operands, 0.5, dropout_p)[1]
    for given in product((True, False), repeat=len(NAMES)):
        has = dict(zip(NAMES, given, strict=True))
        call = [operands["dy"], *(operands[name] if has[name] else None for name in NAMES)]
        call += [seed_of(dropout_p), 0.5, dropout_p, torch.float32]
        out = torch.full((M, K), torch.nan)
        gradients = steps.backward(*call, out, choice=choice)
        there = has["weight"] and has["lora_A"] and has["lora_B"], has["x"] and has["lora_B"], has["S"]
        assert tuple(gradient is not None for gradient in gradients) == there, has
        assert gradients[0] is (out if there[0] else None)
        for gradient, right in zip(gradients, expected, strict=True):
            if gradient is not None:
                assert_close(gradient, right, torch.float32)
        if all(given):
            assert all(map(torch.equal, gradients, steps.backward(*call, choice=choice)))


def test_choices():
    """The tile may be any that is valid on the target; the form alone leaves it to the shape."""
    assert steps.parse_choice("addmm", torch.float32, "ieee", INTERPRETER) == (False, None)
    assert steps.parse_choice("fused", torch.float32, "ieee", INTERPRETER) == (True, None)
    fused, tile = steps.parse_choice("fused/128,256,64,32,8,3,8", torch.bfloat16, "ieee", INTERPRETER)
    assert (fused, str(tile)) == (True, "128,256,64,32,8,3,8")


@pytest.mark.parametrize(
    ("choice", "target", "message"),
    [
        ("torch", INTERPRETER, r'choice must be one of .*"fused/<tile>", got \'torch\''),
        ("addmm/128,256,64,32,8,3,8", INTERPRETER, "choice must be one of"),
        ("fused/128", INTERPRETER, r"'128' is no tile for torch.bfloat16 on this GPU, expected one of 128,256,64,32,8,3,8, "),
        ("fused/128,256,64,32,8,3,8", AMPERE, "is no tile for torch.bfloat16 on this GPU"),
    ],
)
def test_bad_choices(choice, target, message):
    with pytest.raises(ValueError, match=message):
        steps.parse_choice(choice, torch.bfloat16, "ieee", target)
