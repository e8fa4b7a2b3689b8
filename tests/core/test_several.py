"""Several adapters on one weight, on all rows or one for each row, against float64 on every backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planned import DTYPES
from saved import saved_by
from torch import Tensor

from fastlora import dropout_mask, oracle, reference, several_ops
from fastlora.dropout import keep_scale
from fastlora.oracle import Case
from fastlora.several import Adapter, lora_adapters

M, K, N = SHAPE = (40, 56, 264)
RANKS, SCALINGS, RATES = (4, 7, 3), (1.5, -0.75, 2.0), (0.3, 0.0, 0.5)
SEED = 11


def drawn(case: Case, rates: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, list[Adapter], Tensor]:
    """x, W, bias, adapters, dy."""
    first = oracle.draw(case)
    adapters = []
    for i, (r, scaling, p) in enumerate(zip(RANKS, SCALINGS, rates, strict=True)):
        own = oracle.draw(Case(case.shape, r, case.dtype, case.adapter_dtype, seed=i + 1))
        adapters.append(Adapter(own.lora_A, own.lora_B, scaling, p))
    return first.x, first.weight, first.bias, adapters, first.dy


def owners() -> Tensor:
    """Rows of each of the three adapters, and some of none, in no order."""
    return torch.randint(-1, 3, (M,), generator=torch.Generator().manual_seed(0))


def eager(x: Tensor, weight: Tensor, adapters: list[Adapter], bias: Tensor, owner: Tensor | None = None) -> Tensor:
    """PEFT's sum, with the masks that `lora_adapters` states."""
    base = torch.nn.functional.linear(x, weight, bias)
    y = base
    for i, (A, B, scaling, p, _) in enumerate(adapters):
        word = i if owner is None else [a.dropout_p for a in adapters].index(p)
        dropped = x.to(A.dtype)
        if p:
            dropped = torch.where(dropout_mask(SEED, M, K, p, projection=word), dropped * keep_scale(p), 0.0)
        term = dropped @ A.t() @ B.t() * scaling
        y = y + (term if owner is None else torch.where((owner == i)[:, None], term, 0.0))
    return y.to(base.dtype)


def results(function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> dict[str, Tensor]:
    x, weight, bias, adapters, dy = tensors
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    adapters = [
        a._replace(lora_A=a.lora_A.detach().requires_grad_(), lora_B=a.lora_B.detach().requires_grad_()) for a in adapters
    ]
    y = function(x, weight, adapters, bias)
    halves = [half for a in adapters for half in a[:2]]
    names = ["y", "dx", "dbias", *(f"d{half}{i}" for i in range(len(adapters)) for half in "AB")]
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, [x, bias, *halves], dy)), strict=True))


def failures(case: Case, function: Callable[..., Tensor], rates: tuple[float, ...], owner: Tensor | None) -> list[str]:
    tensors = drawn(case, rates)
    exact = tuple(
        [a._replace(lora_A=a.lora_A.double(), lora_B=a.lora_B.double()) for a in part]
        if isinstance(part, list)
        else part.double()
        for part in tensors
    )
    own, ref = (results(partial(eager, owner=owner), each) for each in (tensors, exact))
    found = results(function, tensors)
    rows = {
        name: oracle.judge(case, name[:2] if name[:2] in ("dA", "dB") else name, found[name], own[name], ref[name])
        for name in ref
    }
    return [f"{name}: {row.error:.2e}, bound {row.bound:.2e} {row.note}" for name, row in rows.items() if not row.passed]


@pytest.mark.parametrize("backend", ["fused", "addmm", "torch"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("rates", [(0.0,) * 3, RATES, (0.3, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_against_float64(backend, routed, rates, dtype, adapter_dtype):
    if backend != "torch" and dtype != torch.float32 and rates != RATES:
        pytest.skip("the kernels of a part are those of a linear")
    owner = owners() if routed else None
    case = Case(SHAPE, 1, dtype, adapter_dtype)
    assert not failures(case, partial(lora_adapters, owner=owner, seed=SEED, backend=backend), rates, owner)
