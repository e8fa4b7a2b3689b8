"""The oracle sees every mistake that a LoRA linear invites, in the outputs that it spoils and in no other.

A mutant is a pair of computations: y comes from the first, the gradients from the second.  A fault in one direction, a dropout
scale missing in backward say, can so be planted alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import dropout_mask, lora_linear, ops, oracle, torch_backend
from fastlora.dropout import keep_scale
from fastlora.kernels import steps
from fastlora.oracle import Case, masked_reference

Linear = Callable[..., Tensor]
SHAPE = (64, 72, 264)  # every output has the elements that one draw needs
P = 0.1
DTYPES = [pytest.param(*pair, id="+".join(oracle.SHORT[dtype] for dtype in pair)) for pair in oracle.DTYPES]
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
right = masked_reference()


def given(argument: str, change: Callable[[Any], Any]) -> Linear:
    """The right computation on another value of one argument."""

    def wrong(*tensors: Tensor, **options: Any) -> Tensor:
        named = dict(zip(NAMES, tensors, strict=True))
        values = named if argument in NAMES else options
        values[argument] = change(values[argument])
        return right(*named.values(), **options)

    return wrong


def returning(change: Callable[[Tensor], Tensor]) -> Linear:
    """The right computation with its output changed."""
    return lambda *tensors, **options: change(right(*tensors, **options))


def with_gradient(argument: str, change: Callable[[Tensor], Tensor]) -> Linear:
    """The right computation, with the gradient of one argument changed."""

    def hooked(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)
            tensor.register_hook(change)
        return tensor

    return given(argument, hooked)


def masked(mask: Callable[[int, int, int, float], Tensor]) -> Linear:
    """The right computation with another mask of (seed, rows, cols, p)."""
    return masked_reference(lambda *arguments, device: mask(*arguments))


def last_zero(axis: int) -> Callable[[Tensor], Tensor]:
    """Zeroes what has the last index along an axis."""
    return lambda t: torch.cat((t.narrow(axis, 0, t.shape[axis] - 1), 0.0 * t.narrow(axis, -1, 1)), axis)


LORA_GRADIENTS = {"dx", "dA", "dB"}
MASKED = {"y"} | LORA_GRADIENTS
#: Mistakes in both directions -> (outputs that must not pass, the mistaken computation).
MISTAKES = {
    "LoRA term dropped": (MASKED, given("lora_B", lambda B: B * 0.0)),
    "scaling doubled": (MASKED, given("scaling", lambda scaling: scaling * 2)),
    "scaling halved": (MASKED, given("scaling", lambda scaling: scaling / 2)),
    "scaling negated": (MASKED, given("scaling", lambda scaling: -scaling)),
    "scaling left out": (MASKED, given("scaling", lambda scaling: 1.0)),
    "last rank left out": (MASKED, given("lora_B", last_zero(1))),
    "last column of x left out": (MASKED, given("x", last_zero(1))),  # a K loop that masks one column too many
    "bias ignored": ({"y", "dbias"}, given("bias", lambda bias: None)),
    "bias doubled": ({"y", "dbias"}, given("bias", lambda bias: bias * 2)),
    "mask shifted by a row": (MASKED, masked(lambda seed, rows, cols, p: dropout_mask(seed, rows + 1, cols, p)[1:])),
    "mask shifted by a column": (MASKED, masked(lambda seed, rows, cols, p: dropout_mask(seed, rows, cols + 1, p)[:, 1:])),
    "mask of the next seed": (MASKED, given("seed", lambda seed: seed ^ 1)),
    "mask inverted": (MASKED, masked(lambda *args: ~dropout_mask(*args))),
    "mask at twice the rate": (MASKED, masked(lambda *args: dropout_mask(*args[:3], 2 * args[3]))),
    "mask at a rate of eight bits": (MASKED, masked(lambda *args: dropout_mask(*args[:3], round(args[3] * 256) / 256))),
    "no dropout": (MASKED, given("dropout_p", lambda p: 0.0)),
    "1/(1-p) missing": (MASKED, given("scaling", lambda scaling: scaling / keep_scale(P))),
}
#: Mutant -> (outputs that must not pass, what gives y, what gives the gradients).
MUTANTS = {
    "last row not written": ({"y"}, returning(last_zero(0)), right),  # a store that masks one row too many
    "NaN in y": ({"y"}, returning(lambda y: y.index_fill(0, torch.tensor([3]), torch.nan)), right),
    "all gradients zero": (LORA_GRADIENTS | {"dbias"}, right, returning(lambda y: y * 0.0)),
}
for name, (spoils, wrong) in MISTAKES.items():
    MUTANTS[name] = spoils, wrong, wrong
    MUTANTS[f"{name} in forward"] = spoils & {"y"}, wrong, right
    MUTANTS[f"{name} in backward"] = spoils - {"y"}, right, wrong
for gradient, argument in oracle.ARGUMENT_OF.items():
    MUTANTS |= {
        f"{gradient} {what}": ({gradient}, right, with_gradient(argument, change))
        for what, change in {
            "zero": torch.zeros_like,
            "negated": torch.neg,
            "doubled": lambda grad: grad * 2,
            "of the mean": lambda grad: grad / SHAPE[0],
            "off by a row": lambda grad: grad.roll(1, 0),
            "NaN": lambda grad: grad * torch.nan,
        }.items()
    }


def _case(dtype: torch.dtype, adapters: torch.dtype) -> Case:
    return Case(SHAPE, 8, dtype, adapters, dropout_p=P)


@functools.cache
def _expected(case: Case) -> tuple[oracle.Inputs, dict[str, Any], dict[str, Any]]:
    """(inputs, eager results, results in float64): the same for every mutant."""
    inputs = oracle.draw(case)
    results = (oracle.evaluate(right, case, given_inputs, case.outputs) for given_inputs in (inputs, inputs.double()))
    return inputs, *results


def _spoilt(case: Case, forward: Linear, backward: Linear) -> set[str]:
    """The outputs that do not pass when `forward` gives y and `backward` the gradients."""
    inputs, eager, exact = _expected(case)
    results = oracle.evaluate(backward, case, inputs, case.outputs)
    if forward is not backward:
        results |= oracle.evaluate(forward, case, inputs, ["y"])
    return {name for name in results if not oracle.judge(case, name, results[name], eager[name], exact[name]).passed}


@pytest.mark.parametrize(("dtype", "adapters"), DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name: str, dtype: torch.dtype, adapters: torch.dtype) -> None:
    spoils, forward, backward = MUTANTS[name]
    assert _spoilt(_case(dtype, adapters), forward, backward) == spoils


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_computed_in_16_bits(dtype: torch.dtype) -> None:
    """Gradients in float32 of 16-bit quality: the reason why their floor is not the base's."""

    def hasty(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return right(x, weight, lora_A.to(x.dtype), lora_B.to(x.dtype), bias, **options)

    assert _spoilt(_case(dtype, torch.float32), hasty, hasty) >= {"dA", "dB"}


#: step and argument -> (the change of that argument, the outputs it spoils)
BACKEND_MUTANTS = {
    "forward scaling": (lambda scaling: scaling * 2, {"y"}),
    "forward bias": (lambda bias: None, {"y"}),
    "forward seed": (lambda seed: seed + 1, {"y", "dB"}),
    "forward dropout_p": (lambda p: 0.2, {"y", "dB"}),
    "backward scaling": (lambda scaling: scaling * 2, LORA_GRADIENTS),
    "backward seed": (lambda seed: seed + 1, {"dx", "dA"}),
    "backward dropout_p": (lambda p: 0.2, {"dx", "dA"}),
    "backward lora_A": (lambda A: A.roll(1, 0), {"dx"}),
    "backward lora_B": (lambda B: B.roll(1, 1), {"dx", "dA"}),
    "backward S": (lambda S: S.roll(1, 0), {"dB"}),
    "backward x": (lambda x: x.roll(1, 0), {"dA"}),
}


@pytest.mark.parametrize("backend", ["fused", "addmm", "torch"])
@pytest.mark.parametrize("name", BACKEND_MUTANTS)
def test_mutated_backend(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through `lora_linear`, its own steps called with one wrong argument, where rounding hides most: bfloat16."""
    step, argument = name.split()
    change, spoils = BACKEND_MUTANTS[name]
    if (backend, argument) == ("torch", "seed"):  # its steps take the packed mask that the operator has made
        argument, change = "mask", lambda mask: mask.roll(1, 0)
    module = torch_backend if backend == "torch" else steps
    original = getattr(module, step)
    signature = inspect.signature(original)

    def mutated(*args: Any, **choice: Any) -> Any:
        bound = signature.bind(*args, **choice)
        bound.arguments[argument] = change(bound.arguments[argument])
        return original(*bound.args, **bound.kwargs)

    monkeypatch.setattr(module, step, mutated)
    monkeypatch.setattr(ops, "_implementation", ops._implementation.__wrapped__)  # which keeps what it has looked up
    function = functools.partial(lora_linear, backend=backend)
    assert _spoilt(_case(torch.bfloat16, torch.bfloat16), function, function) == spoils
