"""gated.py: each launch against float64, with operands of any strides, on targets that split the reductions."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import AMPERE, MANY, OPERANDS, VIEWS, Operands, assert_close
from torch import Tensor

from fastlora import dropout_mask, oracle
from fastlora.dropout import DOWN, keep_scale
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code
from fastlora.kernels.gated import gated, gated_backward, plan_gated, plan_gated_backward
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.kernels.tensor_spec import TensorSpec

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
SEED = torch.tensor([7])


def facts_of(e: Tensor, A: Tensor | None, activation: str, dropout_p: float, target: Target) -> Any:
    specs = TensorSpec.of_each(e, A)
    return *specs, activation, mask_code(dropout_p, SEED if dropout_p else None, target), matmul_precision(e.dtype), target


def run_gated(e: Tensor, g: Tensor, A: Tensor | None, activation: str, p: float, target: Target) -> tuple[Tensor, Tensor]:
    plan = plan_gated(*facts_of(e, A, activation, p, target))
    h, S = gated(plan, e, g, A, seed=SEED if p else None, dropout_p=p)
    return h, sum_partials(plan_sum(plan.results[1]), S)[0]


def run_backward(
    dh: Tensor, e: Tensor, g: Tensor, dS: Tensor | None, A: Tensor | None, activation: str, p: float, target: Target
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_gated_backward(*facts_of(e, A, activation, p, target))
    de, dg, dA = gated_backward(plan, dh.clone(), e, g, dS, A, seed=SEED if p else None, dropout_p=p)
    return de, dg, sum_partials(plan_sum(plan.results[1]), dA)[0]


def kept(M: int, K: int, p: float) -> Tensor | float:
    return dropout_mask(SEED, M, K, p, projection=DOWN) * keep_scale(p) if p else 1.0


CASES = [o for o in OPERANDS if o.view == "contiguous" and o.target == INTERPRETER]
CASES += [Operands((70, 72, 16), target=target) for target in (MANY, AMPERE)]


@pytest.mark.parametrize("operands", CASES, ids=str)
def test_against_float64(operands: Operands) -> None:
    p = 0.3
    e, A, dS = operands.draw()
    A = VIEWS["transposed"](A)
    g, dh = torch.randn_like(e), torch.randn_like(e)
    M, K = e.shape
    E, G, exact_A = (t.double().requires_grad_() for t in (e, g, A))
    exact_h = F.silu(E) * G
    S = (exact_h * kept(M, K, p)) @ exact_A.t()
    h, found_S = run_gated(e, g, A, "silu", p, operands.target)
    assert_close(h, exact_h, e.dtype)
    # S and dA are those of the rounded h, as eager torch rounds it.
    rounded = h.double() * kept(M, K, p)
    assert_close(found_S, rounded @ A.double().t(), e.dtype)
    exact_de, exact_dg = torch.autograd.grad((exact_h * dh.double()).sum() + (S * dS.double()).sum(), (E, G))
    de, dg, dA = run_backward(dh, e, g, dS, A, "silu", p, operands.target)
    assert_close(de, exact_de, e.dtype)
    assert_close(dg, exact_dg, e.dtype)
    assert_close(dA, dS.double().t() @ rounded, e.dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of NumPy, at -200
@pytest.mark.parametrize("target", [INTERPRETER, MANY], ids=["few", "many"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range_without_an_adapter(activation: str, target: Target) -> None:
    """From where act is 0 to where it is e, and at both infinities of a sigmoid's exponent."""
    e = torch.cat((torch.linspace(-12, 12, 500), torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0]))).view(5, 101)
    g, dh = torch.randn_like(e), torch.randn_like(e)
    E, G = e.double().requires_grad_(), g.double().requires_grad_()
    exact = ACTIVATIONS[activation](E) * G
    h, S = run_gated(e, g, None, activation, 0.0, target)
    assert S.shape == (5, 0)
    found = (h, *run_backward(dh, e, g, None, None, activation, 0.0, target)[:2])
    for result, ref in zip(found, (exact, *torch.autograd.grad(exact, (E, G), dh.double())), strict=True):
        assert oracle.relative_error(result, ref.detach()) <= oracle.FLOOR[torch.float32, torch.float32]


def test_ranks_beyond_one_block() -> None:
    e, g, dh, A, dS = (torch.randn(size) for size in ((70, 40), (70, 40), (70, 40), (130, 40), (70, 130)))
    h, S = run_gated(e, g, A, "silu", 0.3, INTERPRETER)
    rounded = h.double() * kept(70, 40, 0.3)
    assert_close(S, rounded @ A.double().t(), torch.float32)
    de, _, dA = run_backward(dh, e, g, dS, A, "silu", 0.3, INTERPRETER)
    assert_close(dA, dS.double().t() @ rounded, torch.float32)
    E = e.double().requires_grad_()
    whole = dh.double() + (dS.double() @ A.double()) * kept(70, 40, 0.3)
    assert_close(de, torch.autograd.grad(F.silu(E) * g.double(), E, whole)[0], torch.float32)
