"""steps.py: choices, what backward gives when operands are missing, and memory that the caller provides."""

import warnings
from itertools import product

import pytest
import torch
from planned import AMPERE, assert_close
from triton.runtime.errors import OutOfResources

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


@pytest.fixture
def too_large(monkeypatch):
    """GEMMs with a product want more tensor memory than there is; the list of their launches."""
    launched, gemm = [], steps.gemm

    def launch(plan, *args, **options):
        if plan.options["HAS_PRODUCT"]:
            launched.append(plan)
            raise OutOfResources(576, 512, "tensor memory")
        return gemm(plan, *args, **options)

    for plan in (steps.plan_forward, steps.plan_backward, steps.plan_y):
        plan.cache_clear()
    monkeypatch.setattr(steps, "gemm", launch)
    yield launched
    for plan in (steps.plan_forward, steps.plan_backward, steps.plan_y):
        plan.cache_clear()


def test_a_step_that_does_not_fit_takes_addmm_and_says_so_once(too_large):
    case = oracle.Case((21, 40, 24), 4, dropout_p=0.3)
    t = oracle.draw(case)
    options = torch.tensor([t.seed]), case.scaling, 0.3
    operands = t.x, t.weight, t.lora_A, t.lora_B

    def step(choice):
        y, S = steps.forward(*operands, t.bias, *options, choice=choice)
        return y, S, *steps.backward(t.dy, *operands, S, *options, torch.float32, choice=choice)

    with pytest.warns(RuntimeWarning, match='"addmm" runs instead: out of resource: tensor memory, Required: 576') as said:
        first = step("fused")
    assert len(said) == len(too_large) == 2  # one for each direction
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = step("fused")
    assert len(too_large) == 2
    assert all(map(torch.equal, first, step("addmm")))
    assert all(map(torch.equal, again, first))


def test_a_tile_that_was_asked_for_does_not_give_way(too_large):
    t = oracle.draw(oracle.Case((21, 40, 24), 4))
    with pytest.raises(OutOfResources):
        steps.forward(t.x, t.weight, t.lora_A, t.lora_B, None, None, 1.0, 0.0, choice="fused/64,64,16,16,8,2,8")


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
