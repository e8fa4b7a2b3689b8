"""`lora_linears`: several projections of one x, each judged by the oracle, and what they share."""

import pytest
import torch
from grouped import SEED, Group, K, M, fused
from saved import saved_by
from torch._dynamo.testing import CompileCounterWithBackend

from fastlora import Projection, lora_linears, oracle, reference
from fastlora.blocks import group
from fastlora.blocks.group import LORA_LINEARS, LORA_LINEARS_BACKWARD, passes
from fastlora.kernels import group as kernels

BACKENDS = ("fused", "addmm", "torch")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


QKV = ((264, 8, 0.1, True), (72, 8, 0.1, False), (64, 8, 0.1, True))
GROUPS = {
    "qkv": QKV,
    "one": ((72, 8, 0.2, True),),
    "no dropout": ((72, 4, 0.0, False), (264, 4, 0.0, True)),
    "ranks and rates": ((72, 3, 0.1, True), (64, 16, 0.0, False), (264, 5, 0.5, True), (72, 2, 0.1, False)),
    "more than a pass": ((64, 2, 0.3, False),) * 5,
    "large ranks": ((72, 130, 0.1, False), (64, 20, 0.1, False)),
    "without an adapter": ((72, 0, 0.1, True), (64, 4, 0.1, True)),
    "everything dropped": ((72, 4, 1.0, False), (64, 4, 1.0, False)),
}


@pytest.mark.filterwarnings("ignore:r=.* is above")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("members", GROUPS.values(), ids=GROUPS)
def test_parity(members, backend):
    group = Group(*members)
    group.assert_parity(fused(group, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)], ids=str)
def test_parity_in_16_bits(dtypes, backend):
    group = Group(*QKV, dtype=dtypes[0], adapter_dtype=dtypes[1])
    group.assert_parity(fused(group, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_mask_for_all(backend):
    group = Group(*QKV)
    group.assert_parity(fused(group, backend, masks="shared"), word=lambda i: 0)


def test_the_test_sees_another_mask():
    with pytest.raises(AssertionError, match="OVER"):
        Group(*QKV).assert_parity(fused(Group(*QKV), "torch"), word=lambda i: 2 - i)


def test_the_test_sees_a_dropped_member(monkeypatch):
    """dx without the LoRA term of the last projection."""
    right = kernels.plan_grad_a

    def wrong(x, U, *args, **options):
        return right(x, U, *args, **options | {"words": options["words"][:2] + options["words"][:1]})

    kernels._plan_a.cache_clear()
    monkeypatch.setattr(kernels, "plan_grad_a", wrong)
    with pytest.raises(AssertionError, match=r"dx .*OVER"):
        Group(*QKV).assert_parity(fused(Group(*QKV), "addmm"))
    kernels._plan_a.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_that_nobody_uses(backend):
    """They take no part in backward, and the others' gradients are those of their calls alone."""
    group = Group(*QKV)
    group.dys[1].zero_()
    expected = group.results(fused(group, backend))

    def without_the_second(x, weights):
        ys = list(fused(group, backend)(x, weights))
        ys[1] = (ys[1] * 0).detach() + x.sum() * 0
        return ys

    found = group.results(without_the_second)
    assert found["dA1"] is found["dB1"] is None
    for name in ("dx", "dA0", "dB0", "dbias0", "dA2", "dB2", "dbias2"):
        assert oracle.relative_error(found[name], expected[name]) <= oracle.FLOOR[F32, F32], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed(backend):
    group = Group(*QKV)
    expected = group.results(fused(group, backend))
    weights = [[*own] for own in group.weights]
    needed = {
        "dA2": weights[2][1].requires_grad_(),
        "dB0": weights[0][2].requires_grad_(),
        "dbias0": weights[0][3].requires_grad_(),
    }
    ys = fused(group, backend)(group.x, weights)
    torch.autograd.backward(ys, group.dys)
    assert group.x.grad is None
    assert all(torch.equal(tensor.grad, expected[name]) for name, tensor in needed.items())
    assert weights[0][1].grad is weights[1][2].grad is None


def test_equal_bits_in_two_runs_and_with_retained_graphs():
    group = Group(*QKV)
    first, second = (group.results(fused(group, "addmm")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = group.x.clone().requires_grad_()
    ys = fused(group, "addmm")(x, group.weights)
    once, again = (torch.autograd.grad(ys, x, group.dys, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ys, x, group.dys, create_graph=True)


def test_saved_bytes():
    """x once, S of all, the seed; the weights are there anyway."""
    group = Group(*QKV)
    x = group.x.clone().requires_grad_()
    own = {tensor.data_ptr() for weights in group.weights for tensor in weights if tensor is not None}
    saved = saved_by(lambda: fused(group, "fused")(x, group.weights))
    new = [tensor for tensor in saved if tensor.data_ptr() not in own and tensor.data_ptr() != x.data_ptr()]
    assert sum(tensor.nbytes for tensor in new) == 3 * M * 8 * 4 + 8
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1


def test_evaluation_and_autocast():
    group = Group(*QKV)
    ys = lora_linears(group.x, group.projections(group.weights), training=False)
    expected = [reference.lora_linear(group.x, *own, scaling=1.5 - i) for i, own in enumerate(group.weights)]
    assert all(oracle.relative_error(y, e) <= oracle.FLOOR[F32, F32] for y, e in zip(ys, expected, strict=True))
    with torch.autocast("cpu", BF16):
        assert {y.dtype for y in fused(group, "torch")(group.x, group.weights)} == {BF16}


def test_the_seed_is_drawn_once():
    group = Group(*QKV)
    torch.manual_seed(0)
    first = lora_linears(group.x, group.projections(group.weights))
    torch.manual_seed(0)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
    again = lora_linears(group.x, group.projections(group.weights), seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_operators(backend):
    group, seed = Group(*QKV), torch.tensor([SEED])
    weights, As, Bs, biases = (list(column) for column in zip(*group.weights, strict=True))
    constants = [0, 1, 2], [1.0, 2.0, 0.5], [0.1, 0.1, 0.0], backend
    torch.library.opcheck(LORA_LINEARS, (group.x, weights, As, Bs, biases, seed, *constants))
    _, Ss, masks = LORA_LINEARS(group.x, weights, As, Bs, biases, seed, *constants)
    for used in ([0, 2], [2], [0, 1, 2]):
        dys, own = [group.dys[i] for i in used], [weights[i] for i in used]
        for dense in (own, []):
            args = dys, used, group.x, dense, As, Bs, Ss, masks, None if backend == "torch" else seed, *constants
            torch.library.opcheck(LORA_LINEARS_BACKWARD, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_compiled_for_every_length(backend):
    group, counter = Group(*QKV), CompileCounterWithBackend("aot_eager")
    adapters = [[own[0], own[1].requires_grad_(), own[2].requires_grad_(), own[3]] for own in group.weights]

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(x):
        return lora_linears(x, group.projections(adapters), seed=SEED, backend=backend)

    for rows in range(2, 9):
        x = group.x[:rows].clone().requires_grad_()
        ys = call(x)
        (ys[0].sum() + ys[2].sum()).backward()
        assert x.grad is not None
    assert counter.frame_count <= 2


def test_passes():
    """Alike projections share one, at most four."""
    found = passes((0, 1, 2, 3, 4, 5), (0.1, 0.0, 0.1, 0.1, 0.1, 0.1), (F32,) * 6)
    assert [step.members for step in found] == [(0, 2, 3, 4), (5,), (1,)]
    assert [step.masks for step in found] == [(0, 2, 3, 4), (5,), ()]
    assert found[0].only([3, 0]).words == (0, 3)


X, W, A, B = torch.randn(6, K), torch.randn(10, K), torch.randn(3, K), torch.randn(10, 3)
ONE = Projection(W, A, B)
REFUSED = {
    "none": ([], {}, ValueError, "1 to 256 projections, got 0"),
    "too many": ([ONE] * 257, {}, ValueError, "1 to 256 projections, got 257"),
    "a tuple": ([(W, A, B)], {}, TypeError, r"sequence of Projection, got \['tuple'\]"),
    "no sequence": (ONE.weight, {}, TypeError, "sequence of Projection, got Tensor"),
    "another in": ([ONE, Projection(W[:, 1:], A[:, 1:], B)], {}, ValueError, r"projections\[1\]: x has shape \(6, 40\)"),
    "another dtype": ([ONE, Projection(W.half(), A, B)], {}, TypeError, r"projections\[1\]: weight is torch.float16"),
    "another device": ([ONE, Projection(W.to("meta"), A, B)], {}, ValueError, r"projections\[1\]: weight is on meta"),
    "trainable": ([Projection(W.clone().requires_grad_(), A, B)], {}, ValueError, r"projections\[0\]: weight requires grad"),
    "rate": ([ONE._replace(dropout_p=1.5)], {}, ValueError, r"projections\[0\]: dropout_p must be in \[0, 1\]"),
    "scaling": ([ONE._replace(scaling=float("nan"))], {}, ValueError, r"projections\[0\]: scaling must be finite"),
    "masks": ([ONE], {"masks": "own"}, ValueError, r"masks must be one of \('separate', 'shared'\), got 'own'"),
    "seed": ([ONE], {"seed": 0.5}, TypeError, "seed must be"),
    "backend": ([ONE], {"backend": "cuda"}, ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize(("projections", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(projections, options, error, message, monkeypatch):
    monkeypatch.setattr(group, "LORA_LINEARS", None)
    with pytest.raises(error, match=message):
        lora_linears(X, projections, **options)
