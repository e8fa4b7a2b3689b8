"""Several adapters on one weight, on all rows or one for each row, against float64 on every backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planned import DTYPES
from saved import saved_by
from torch import Tensor

from fastlora import dropout_mask, oracle
from fastlora.dropout import keep_scale
from fastlora.oracle import Case
from fastlora.variants import several_ops
from fastlora.variants.several import Adapter, lora_adapters

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


def each_half(adapters: list[Adapter], change: Callable[[Tensor], Tensor]) -> list[Adapter]:
    return [adapter._replace(lora_A=change(adapter.lora_A), lora_B=change(adapter.lora_B)) for adapter in adapters]


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


def assert_parity(rates: tuple[float, ...], routed: bool, backend: str, *dtypes: Any) -> None:
    owner = owners() if routed else None
    assert not failures(Case(SHAPE, 1, *dtypes), partial(lora_adapters, owner=owner, seed=SEED, backend=backend), rates, owner)


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_against_float64(backend, routed, dtype, adapter_dtype):
    assert_parity(RATES, routed, backend, dtype, adapter_dtype)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("rates", [(0.0, 0.0, 0.0), (0.3, 0.3, 0.3), (0.3, 1.0, 0.0)], ids=str)
def test_rates_that_make_other_parts(routed, rates):
    assert_parity(rates, routed, "torch", torch.float32)
    assert_parity(rates, routed, "torch", torch.bfloat16, torch.float32)


@pytest.mark.parametrize("planted", ["scaling", "owner", "seed", "order"])
def test_planted_errors_are_seen(planted):
    def wrong(x, weight, adapters, bias):
        owner, seed = owners(), SEED
        if planted == "scaling":
            adapters = [adapters[0]._replace(scaling=1.4), *adapters[1:]]
        elif planted == "owner":
            owner[0] = (owner[0] + 2) % 4 - 1
        elif planted == "seed":
            seed += 1
        else:
            adapters = [adapters[1]._replace(dropout_p=RATES[0]), adapters[0]._replace(dropout_p=0.0), adapters[2]]
        return lora_adapters(x, weight, adapters, bias, owner=owner, seed=seed)

    if planted == "order":
        x, weight, bias, adapters, _ = drawn(Case(SHAPE, 1), RATES)
        assert oracle.relative_error(wrong(x, weight, adapters, bias), eager(x, weight, adapters, bias, owners())) > 0.01
    else:
        assert {"y", "dx"} <= {line.partition(":")[0] for line in failures(Case(SHAPE, 1), wrong, RATES, owners())}


def test_what_is_saved():
    """x and W once, the adapters, S of all, and the bits of each mask."""
    x, weight, bias, adapters, _ = drawn(Case((512, 128, 160), 1), RATES)
    given = [adapter._replace(lora_A=adapter.lora_A.requires_grad_()) for adapter in adapters]
    saved = saved_by(lambda: lora_adapters(x.requires_grad_(), weight, given, bias))
    sizes = sorted((tuple(t.shape) for t in saved if t.numel() > 14 * 160), key=str)
    assert sizes == sorted([(512, 128), (160, 128), (512, 14), (1, 512, 16), (1, 512, 16)], key=str)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("wanted", ["x", "bias", 1])
def test_one_gradient_alone_is_that_of_all(wanted, routed):
    x, weight, bias, adapters, dy = drawn(Case(SHAPE, 1), RATES)

    def gradient(everything: bool) -> Tensor:
        leaves = {"x": x.detach().clone(), "bias": bias.detach().clone(), 1: adapters[1].lora_B.detach().clone()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(everything or name == wanted)
        given = [adapters[0], adapters[1]._replace(lora_B=leaves[1]), adapters[2]]
        options = {"owner": owners() if routed else None, "seed": SEED}
        y = lora_adapters(leaves["x"], weight, given, leaves["bias"], **options)
        return torch.autograd.grad(y, leaves[wanted], dy)[0]

    assert torch.equal(gradient(everything=False), gradient(everything=True))


@pytest.mark.parametrize("routed", [False, True])
def test_opcheck(routed):
    x, weight, bias, adapters, dy = drawn(Case((9, 24, 40), 1), RATES)
    lora_As, lora_Bs = [a.lora_A for a in adapters], [a.lora_B for a in adapters]
    route = torch.rand(9, 14) > 0.5 if routed else None
    options = torch.tensor([5]), [0, 0, 2], list(RATES), "torch"
    _, U, masks = several_ops.LORA_ADAPTERS(x, weight, lora_As, lora_Bs, bias, route, *options)
    torch.library.opcheck(several_ops.LORA_ADAPTERS, (x, weight, lora_As, lora_Bs, bias, route, *options))  # raises
    for held in (weight, None):
        operands = dy, x, held, lora_As, lora_Bs, U, route, masks, *options
        torch.library.opcheck(several_ops.LORA_ADAPTERS_BACKWARD, operands, test_utils=("test_schema", "test_faketensor"))


def test_compiled():
    x, weight, bias, adapters, dy = drawn(Case(SHAPE, 1), RATES)
    adapters[0].lora_A.requires_grad_()

    def call(x: Tensor, owner: Tensor) -> Tensor:
        return lora_adapters(x, weight, adapters, bias, owner=owner, seed=SEED)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (M, M - 3):
        part = x[:rows].clone().requires_grad_(), owners()[:rows].clone()
        results = [
            [y.detach(), *torch.autograd.grad(y, [part[0], adapters[0].lora_A], dy[:rows])]
            for y in (compiled(*part), call(*part))
        ]
        torch.testing.assert_close(*results)


def test_second_derivatives_are_refused():
    x, weight, bias, adapters, _ = drawn(Case(SHAPE, 1), RATES)
    y = lora_adapters(x.requires_grad_(), weight, adapters, bias)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


ONE = Adapter(torch.ones(2, 4), torch.ones(6, 2))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"adapters": []}, TypeError, "at least one Adapter"),
    "another type": ({"adapters": [ONE, (ONE.lora_A, ONE.lora_B)]}, TypeError, r"Adapter, got \['Adapter', 'tuple'\]"),
    "too many": ({"adapters": [ONE] * 257}, ValueError, "at most 256 adapters, got 257"),
    "shape": ({"adapters": [ONE, ONE._replace(lora_A=torch.ones(2, 5))]}, ValueError, r"adapters\[1\]: lora_A must be"),
    "rate": ({"adapters": [ONE._replace(dropout_p=2.0)]}, ValueError, r"adapters\[0\]: dropout_p must be in"),
    "scaling": ({"adapters": [ONE._replace(scaling=float("nan"))]}, ValueError, r"adapters\[0\]: scaling must be finite"),
    "magnitude": ({"adapters": [ONE._replace(magnitude=torch.ones(6))]}, ValueError, r"adapters\[0\]: it has a magnitude"),
    "owner's type": ({"owner": [0, 0, 0]}, TypeError, "owner must be an int64 tensor, got list"),
    "owner's dtype": ({"owner": torch.zeros(3)}, TypeError, "owner must be an int64 tensor, got torch.float32"),
    "owner's shape": (
        {"owner": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"owner must be \(M,\) = \(3,\) on cpu, got \(2,\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    change, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        lora_adapters(**{"x": torch.ones(3, 4), "weight": torch.ones(6, 4), "adapters": [ONE], **change})
