"""lora_mlp: the oracle's verdict on every output, what is saved, and the tools of torch that it works under."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gated import Mlp, failures, results
from saved import saved_by
from torch.utils.checkpoint import checkpoint

from fastlora import Projection, lora_mlp, oracle
from fastlora.blocks.mlp import ACTIVATIONS
from fastlora.oracle import DTYPES

BACKENDS = ("fused", "addmm", "torch")
DROPPING = replace(Mlp(), rates=(0.1, 0.1, 0.1))

pytestmark = pytest.mark.filterwarnings("ignore:r=.* is above min")


def all_equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_output(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float, backend: str) -> None:
    assert failures(Mlp(dtypes=dtypes, rates=(dropout_p,) * 3), backend=backend) == []


CASES = {
    "ragged": Mlp((37, 39, 67, 21), rates=(0.3, 0.3, 0.3)),
    "multiples": Mlp((64, 64, 128, 64), rates=(0.3, 0.0, 0.2)),
    "own rates": replace(DROPPING, rates=(0.1, 0.5, 1.0), bias=False),
    "own ranks": replace(DROPPING, ranks=(3, 17, 40)),
    "beyond one block of ranks": replace(DROPPING, sizes=(20, 136, 140, 132), ranks=(4, 4, 130)),
    "gate alone": replace(DROPPING, ranks=(4, 0, 0)),
    "up alone": replace(DROPPING, ranks=(0, 4, 0)),
    "down alone": replace(DROPPING, ranks=(0, 0, 4)),
    "no adapter": replace(DROPPING, ranks=(0, 0, 0)),
    "no rows": replace(DROPPING, sizes=(0, 40, 56, 24)),
    **{activation: replace(DROPPING, activation=activation) for activation in ACTIVATIONS[1:]},
}


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_ranks_rates_and_activations(case: str, backend: str) -> None:
    assert failures(CASES[case], backend=backend) == []


@pytest.mark.parametrize("planted", ["rates", "activation", "seed", "up for gate"])
def test_planted_errors_are_seen(planted: str) -> None:
    wrong = replace(
        DROPPING,
        **{"rates": {"rates": (0.1, 0.1, 0.0)}, "seed": {"seed": 6}, "activation": {"activation": "gelu"}}.get(planted, {}),
    )

    def function(leaves: list[torch.Tensor]) -> torch.Tensor:
        x, (gate, up, down) = wrong.projections(leaves)
        gate, up = (up, gate) if planted == "up for gate" else (gate, up)
        return lora_mlp(x, gate, up, down, activation=wrong.activation, seed=wrong.seed)

    assert len(failures(DROPPING, function)) >= 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_and_retained_graphs_are_equal_and_nothing_is_written(backend: str) -> None:
    leaves, dy = DROPPING.draw()
    before = [t.detach().clone() for t in (*leaves, dy)]
    y = DROPPING.fused(leaves, backend=backend)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    first, second = (torch.autograd.grad(y, trained, dy, retain_graph=True) for _ in range(2))
    again = results(lambda leaves: DROPPING.fused(leaves, backend=backend), leaves, dy)
    assert all_equal(first, second)
    assert all_equal((y, *first), again)
    assert all_equal((*leaves, dy), before)


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_saved_for_backward(backend: str) -> None:
    """x, e and g, the parameters by reference, each S, and the seed or a bit an element and mask."""
    mlp = replace(DROPPING, sizes=(64, 48, 96, 32), dtypes=(torch.bfloat16, torch.float32))
    leaves, _ = mlp.draw()
    saved = saved_by(lambda: mlp.fused(leaves, backend=backend))
    shared = {leaf.data_ptr() for leaf in leaves}
    new = [tensor for tensor in saved if tensor.data_ptr() not in shared]
    wide, S = 2 * 64 * 96 * 2, 3 * 64 * 4 * 4
    masks = 64 * (48 + 48 + 96) // 8 if backend == "torch" else 8
    assert sum(tensor.nbytes for tensor in new) == wide + S + masks
    assert leaves[0].data_ptr() in {tensor.data_ptr() for tensor in saved}


@pytest.mark.parametrize("frozen", ["x", "adapters", "biases"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    mlp = replace(DROPPING, bias=frozen == "biases")
    leaves, dy = mlp.draw()
    expected = dict(zip([id(t) for t in leaves if t.requires_grad], results(mlp.fused, leaves, dy)[1:], strict=True))
    chosen = {"x": leaves[:1], "adapters": [t for t in leaves[1:] if t.requires_grad], "biases": leaves[4::4]}[frozen]
    for leaf in chosen:
        leaf.requires_grad_(False)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    assert 0 < len(trained) < len(expected)
    grads = torch.autograd.grad(mlp.fused(leaves), trained, dy)
    assert all_equal(grads, [expected[id(leaf)] for leaf in trained])


def test_second_derivatives_are_refused() -> None:
    leaves, _ = Mlp().draw()
    with pytest.raises(RuntimeError, match="lora_mlp has no second derivative"):
        torch.autograd.grad(Mlp().fused(leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: Mlp().fused([x, *leaves[1:]]).sum())(leaves[0].detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(use_reentrant: bool) -> None:
    leaves, dy = DROPPING.draw()
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)

        def call(x: torch.Tensor) -> torch.Tensor:
            return DROPPING.fused([x, *leaves[1:]], seed=None)

        y = checkpoint(call, leaves[0], use_reentrant=use_reentrant) if recompute else call(leaves[0])
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    assert all_equal(*found)


def test_any_leading_dimensions_and_strides() -> None:
    leaves, dy = DROPPING.draw()
    flat = results(DROPPING.fused, leaves, dy)
    x = torch.stack((leaves[0].detach(), leaves[0].detach()), 1)[:, 0].view(3, 11, -1).requires_grad_()
    shaped = results(DROPPING.fused, [x, *leaves[1:]], dy.view(3, 11, -1))
    assert [tuple(t.shape) for t in shaped[:2]] == [(3, 11, 24), (3, 11, 40)]
    assert all_equal([t.flatten() for t in shaped], [t.flatten() for t in flat])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    leaves, dy = DROPPING.draw()
    cast = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in leaves]
    expected = results(DROPPING.fused, cast, dy.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        found = results(DROPPING.fused, leaves, dy.to(dtype))
    assert found[0].dtype == dtype
    assert all_equal(found[1:], [grad.float() for grad in expected[1:]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_autocast_computes_in_the_dtype_of_forward(backend: str) -> None:
    case = replace(DROPPING, ranks=(0, 0, 4))
    leaves, dy = case.draw()
    _, *expected = results(partial(case.fused, backend=backend), leaves, dy)
    y = case.fused(leaves, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all_equal(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy), expected)


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("ranks", [(4, 3, 4), (0, 4, 0)])
def test_opcheck(ranks: tuple[int, int, int], backend: str) -> None:
    mlp = replace(DROPPING, ranks=ranks)
    x, linears = mlp.projections([t.detach() for t in mlp.draw()[0]])
    weights, As, Bs, biases = ([linear[i] for linear in linears] for i in range(4))
    As = [torch.empty(0, w.shape[1]) if A is None else A for A, w in zip(As, weights, strict=True)]
    Bs = [torch.empty(w.shape[0], 0) if B is None else B for B, w in zip(Bs, weights, strict=True)]
    seed, constants = torch.tensor([5]), ([0.5] * 3, [0.25] * 3, "silu")
    operands = x, weights, As, Bs, biases, seed, *constants
    torch.library.opcheck(torch.ops.fastlora.lora_mlp, (*operands, backend))  # raises
    y, e, g, Ss, masks = torch.ops.fastlora.lora_mlp(*operands, backend)
    for needed in (weights, weights[2:]):
        given = torch.randn_like(y), x, e, g, needed, As, Bs, Ss, masks, seed, *constants, [True, False, True], backend
        torch.library.opcheck(torch.ops.fastlora.lora_mlp_backward, given)


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_compile_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return DROPPING.fused(list(leaves), seed=None, backend=backend).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (33, 17):
        leaves, dy = replace(DROPPING, sizes=(rows, 40, 56, 24)).draw()
        found = []
        for function in (call, compiled):
            torch.manual_seed(2)
            found.append(results(lambda leaves, function=function: function(*leaves), leaves, dy))
        assert all_equal(*found)


W = torch.randn(6, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activation": (
        {"activation": "relu"},
        ValueError,
        r"activation must be one of \('silu', 'gelu', 'gelu_pytorch_tanh'\), got 'relu'",
    ),
    "no projection": ({"gate": W}, TypeError, "gate must be a Projection, got Tensor"),
    "half an adapter": (
        {"up": Projection(W, torch.randn(2, 4), None)},
        TypeError,
        "up: lora_A and lora_B must both be tensors or both None",
    ),
    "in": ({"up": Projection(torch.randn(6, 5), None, None)}, ValueError, "up: x has shape"),
    "out": (
        {"up": Projection(torch.randn(7, 4), None, None)},
        ValueError,
        "gate and up must have one out_features, got 6 and 7",
    ),
    "intermediate": (
        {"down": Projection(W, None, None)},
        ValueError,
        r"down: gate has 6 out_features, but down's weight \(6, 4\) expects 4",
    ),
    "dtype": (
        {"down": Projection(W.t().double(), None, None)},
        TypeError,
        "down: weight is torch.float64 but x is torch.float32",
    ),
    "trained weight": ({"gate": Projection(W.clone().requires_grad_(), None, None)}, ValueError, "gate: weight requires grad"),
    "dropout": (
        {"gate": Projection(W, None, None, dropout_p=2.0)},
        ValueError,
        r"gate: dropout_p must be in \[0, 1\], got 2.0",
    ),
    "seed": ({"seed": 1.5}, TypeError, "seed must be"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, kind, message = BAD[case]
    linears = {"gate": Projection(W, None, None), "up": Projection(W, None, None), "down": Projection(W.t(), None, None)}
    x, state = torch.randn(3, 4), torch.get_rng_state()
    with pytest.raises(kind, match=message):
        lora_mlp(x, **linears | change)
    assert torch.equal(torch.get_rng_state(), state)


def test_quantised_weights() -> None:
    """Each is made dense for its products, and saved packed."""
    from quantized_layers import quantize

    from fastlora.quantized import weight_of

    mlp = replace(DROPPING, sizes=(32, 64, 128, 64), bias=False)
    leaves, dy = mlp.draw()
    x, linears = mlp.projections(leaves)
    packed = [linear._replace(weight=weight_of(quantize(linear.weight, "nf4", None))) for linear in linears]
    dense = [linear._replace(weight=own.weight.dequantize(torch.float32)) for linear, own in zip(linears, packed, strict=True)]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    found = [torch.autograd.grad(lora_mlp(x, *given, seed=1), trained, dy) for given in (packed, dense)]
    assert all(oracle.relative_error(a, b) <= oracle.FLOOR[torch.float32, torch.float32] for a, b in zip(*found, strict=True))
    sizes = {tuple(t.shape) for t in saved_by(lambda: lora_mlp(x, *packed, seed=1))}
    assert not sizes & {(128, 64), (64, 128)}
