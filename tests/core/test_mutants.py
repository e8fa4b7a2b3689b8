"""The oracle bites: every way to be wrong that a LoRA linear invites is seen, in the outputs it spoils and in no other.

A mutant is a pair of computations: y comes from the first, the gradients from the second.  Both are the right one unless the
mutant changes it, so that a fault in one direction, a dropout scale missing in backward say, can be planted alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import dropout_mask, ops, oracle, torch_backend
from fastlora.dropout import keep_scale
from fastlora.kernels import steps
from fastlora.oracle import Case, masked_reference

Linear = Callable[..., Tensor]
SHAPE = (64, 72, 264)  # every output has the elements that one draw needs
RANK = 8
BACKENDS = ("fused", "addmm", "torch")
DTYPES = [pytest.param(*pair, id="+".join(oracle.SHORT[dtype] for dtype in pair)) for pair in oracle.FLOOR]
right = masked_reference()


class _ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@dataclass(frozen=True)
class Mutant:
    """`forward` gives y, `backward` the gradients; `spoils` are the outputs that must not pass."""

    spoils: set[str]
    forward: Linear = right
    backward: Linear = right

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            value = self.forward(*tensors, **options)
        return _ValueOf.apply(value, self.backward(*tensors, **options))


def everywhere(spoils: set[str], wrong: Linear) -> Mutant:
    return Mutant(spoils, wrong, wrong)


def scaled(factor: float) -> Linear:
    return lambda *tensors, scaling, **options: right(*tensors, scaling=scaling * factor, **options)


def masked(mask: Callable[..., Tensor]) -> Linear:
    return masked_reference(mask)


def unscaled_dropout(*tensors: Tensor, scaling: float, dropout_p: float, seed: int) -> Tensor:
    return right(*tensors, scaling=scaling / keep_scale(dropout_p), dropout_p=dropout_p, seed=seed)


def without_bias(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return right(x, weight, lora_A, lora_B, None, **options)


def doubled_bias(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return right(x, weight, lora_A, lora_B, bias * 2, **options)


def frozen_only(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.linear(x, weight, bias) + 0.0 * right(x, weight, lora_A, lora_B, bias, **options)


def without_dropout(*tensors: Tensor, scaling: float, dropout_p: float, seed: int) -> Tensor:
    return right(*tensors, scaling=scaling, dropout_p=0.0, seed=seed)


def rank_one_short(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
    keep = torch.ones(lora_B.shape[1], device=x.device, dtype=lora_B.dtype)
    keep[-1] = 0.0
    return right(x, weight, lora_A, lora_B * keep, bias, **options)


def last_column_lost(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """A K loop that masks one column too many."""
    keep = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    keep[-1] = 0.0
    return right(x * keep, *tensors, **options)


def last_row_zero(*tensors: Tensor, **options: Any) -> Tensor:
    """A store that masks one row too many."""
    return right(*tensors, **options).index_fill(0, torch.tensor([SHAPE[0] - 1]), 0.0)


def one_nan(*tensors: Tensor, **options: Any) -> Tensor:
    return right(*tensors, **options).index_fill(0, torch.tensor([3]), torch.nan)


def with_gradient(argument: str, change: Callable[[Tensor], Tensor]) -> Linear:
    """The right computation, with the gradient of one argument replaced."""
    index = ("x", "weight", "lora_A", "lora_B", "bias").index(argument)

    def wrong(*tensors: Tensor, **options: Any) -> Tensor:
        arguments = list(tensors)
        if arguments[index].requires_grad:
            arguments[index] = arguments[index].view_as(arguments[index])
            arguments[index].register_hook(change)
        return right(*arguments, **options)

    return wrong


def _rows_shifted(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return dropout_mask(seed, rows + 1, cols, p, **options)[1:]


def _columns_shifted(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return dropout_mask(seed, rows, cols + 1, p, **options)[:, 1:]


def _eighth_bit_rate(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return dropout_mask(seed, rows, cols, round(p * 256) / 256, **options)


def _double_rate(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return dropout_mask(seed, rows, cols, 2 * p, **options)


def _inverted(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return ~dropout_mask(seed, rows, cols, p, **options)


def _next_seed(seed: int, rows: int, cols: int, p: float, **options: Any) -> Tensor:
    return dropout_mask(seed ^ 1, rows, cols, p, **options)


MASKED = {"y", "dx", "dA", "dB"}
GRADIENTS = {"dx", "dA", "dB", "dbias"}
MUTANTS = {
    "all gradients zero": Mutant(GRADIENTS, backward=lambda *t, **o: right(*t, **o) * 0.0),
    **{
        f"{gradient} {what}": Mutant({gradient}, backward=with_gradient(argument, change))
        for gradient, argument in oracle.ARGUMENT_OF.items()
        for what, change in {
            "zero": torch.zeros_like,
            "negated": torch.neg,
            "doubled": lambda grad: grad * 2,
            "of the mean": lambda grad: grad / SHAPE[0],
            "off by a row": lambda grad: grad.roll(1, 0),
            "NaN": lambda grad: grad * torch.nan,
        }.items()
    },
    "LoRA term dropped": everywhere(MASKED, frozen_only),
    "LoRA term dropped in forward": Mutant({"y"}, forward=frozen_only),
    "scaling doubled": everywhere(MASKED, scaled(2.0)),
    "scaling halved": everywhere(MASKED, scaled(0.5)),
    "scaling negated": everywhere(MASKED, scaled(-1.0)),
    "scaling left out in backward": Mutant({"dx", "dA", "dB"}, backward=scaled(1 / Case.scaling)),
    "last rank left out": everywhere(MASKED, rank_one_short),
    "last column of x left out": everywhere(MASKED, last_column_lost),
    "last row not written": Mutant({"y"}, forward=last_row_zero),
    "NaN in y": Mutant({"y"}, forward=one_nan),
    "bias ignored": everywhere({"y", "dbias"}, without_bias),
    "bias ignored in forward": Mutant({"y"}, forward=without_bias),
    "bias doubled": everywhere({"y", "dbias"}, doubled_bias),
    "mask shifted by a row": everywhere(MASKED, masked(_rows_shifted)),
    "mask shifted by a row in backward": Mutant({"dx", "dA", "dB"}, backward=masked(_rows_shifted)),
    "mask shifted by a column": everywhere(MASKED, masked(_columns_shifted)),
    "mask of the next seed": everywhere(MASKED, masked(_next_seed)),
    "mask inverted": everywhere(MASKED, masked(_inverted)),
    "mask at twice the rate": everywhere(MASKED, masked(_double_rate)),
    "mask at a rate of eight bits": everywhere(MASKED, masked(_eighth_bit_rate)),
    "no dropout": everywhere(MASKED, without_dropout),
    "no dropout in backward": Mutant({"dx", "dA", "dB"}, backward=without_dropout),
    "1/(1-p) missing": everywhere(MASKED, unscaled_dropout),
    "1/(1-p) missing in forward": Mutant({"y"}, forward=unscaled_dropout),
    "1/(1-p) missing in backward": Mutant({"dx", "dA", "dB"}, backward=unscaled_dropout),
}


def _case(dtype: torch.dtype, adapters: torch.dtype) -> Case:
    return Case(SHAPE, RANK, dtype, adapters, dropout_p=0.1)


def _spoilt(rows: list[oracle.Row]) -> set[str]:
    return {row.output for row in rows if not row.passed}


@pytest.mark.parametrize(("dtype", "adapters"), DTYPES)
def test_the_unmutated_pass(dtype: torch.dtype, adapters: torch.dtype) -> None:
    oracle.assert_parity(_case(dtype, adapters), Mutant(set()))
    for backend in BACKENDS:
        oracle.assert_parity(_case(dtype, adapters), backend=backend)


@pytest.mark.parametrize(("dtype", "adapters"), DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name: str, dtype: torch.dtype, adapters: torch.dtype) -> None:
    mutant = MUTANTS[name]
    rows = oracle.check(_case(dtype, adapters), mutant)
    assert _spoilt(rows) == mutant.spoils, oracle.table(rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_computed_in_16_bits(dtype: torch.dtype) -> None:
    """Gradients in float32 of 16-bit quality: the reason why their floor is not the base's."""

    def hasty(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return right(x, weight, lora_A.to(x.dtype), lora_B.to(x.dtype), bias, **options)

    rows = oracle.check(_case(dtype, torch.float32), hasty)
    assert {"dA", "dB"} <= _spoilt(rows), oracle.table(rows)


#: step and argument -> (the change of that argument, the outputs it spoils)
BACKEND_MUTANTS = {
    "forward scaling": (lambda scaling: scaling * 2, {"y"}),
    "forward bias": (lambda bias: None, {"y"}),
    "forward seed": (lambda seed: seed + 1, {"y", "dB"}),
    "forward dropout_p": (lambda p: 0.2, {"y", "dB"}),
    "backward scaling": (lambda scaling: scaling * 2, {"dx", "dA", "dB"}),
    "backward seed": (lambda seed: seed + 1, {"dx", "dA"}),
    "backward dropout_p": (lambda p: 0.2, {"dx", "dA"}),
    "backward lora_A": (lambda A: A.roll(1, 0), {"dx"}),
    "backward lora_B": (lambda B: B.roll(1, 1), {"dx", "dA"}),
    "backward S": (lambda S: S.roll(1, 0), {"dB"}),
    "backward x": (lambda x: x.roll(1, 0), {"dA"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "adapters"), DTYPES)
@pytest.mark.parametrize("name", BACKEND_MUTANTS)
def test_mutated_backend(
    name: str, dtype: torch.dtype, adapters: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through `lora_linear`: its own steps, called with one wrong argument."""
    step, argument = name.split()
    change, spoils = BACKEND_MUTANTS[name]
    module = torch_backend if backend == "torch" else steps
    original = getattr(module, step)
    signature = inspect.signature(original)

    def mutated(*args: Any, **choice: Any) -> Any:
        bound = signature.bind(*args, **choice)
        bound.arguments[argument] = change(bound.arguments[argument])
        return original(*bound.args, **bound.kwargs)

    monkeypatch.setattr(module, step, mutated)
    monkeypatch.setattr(ops, "_implementation", ops._implementation.__wrapped__)  # which keeps what it has looked up
    rows = oracle.check(_case(dtype, adapters), backend=backend)
    assert _spoilt(rows) == spoils, oracle.table(rows)
