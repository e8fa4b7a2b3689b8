"""The operators and the Function: gradients, what is saved, what is computed, and the tools of torch they work under."""

import threading

import pytest
import torch
from saved import saved_by

from fastlora import lora_linear, oracle, rows
from fastlora.dropout import packed_mask
from fastlora.oracle import Case

BACKENDS = ("fused", "addmm", "torch")
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


def inputs(M=33, K=24, N=40, r=4, dtype=torch.float32, adapter_dtype=None, requires_grad=True) -> dict[str, torch.Tensor]:
    drawn = oracle.draw(Case((M, K, N), r, dtype, adapter_dtype))
    return {name: getattr(drawn, name).requires_grad_(requires_grad and name != "weight") for name in NAMES}


def grads(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name].grad for name in NAMES if name != "weight"]


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(dropout_p, bias):
    drawn = inputs(M=7, K=5, N=6, r=3, requires_grad=False)
    tensors = {name: tensor.double().requires_grad_(name != "weight") for name, tensor in drawn.items()}
    weight = tensors.pop("weight")
    if not bias:
        del tensors["bias"]

    def call(x, lora_A, lora_B, bias=None):
        return lora_linear(x, weight, lora_A, lora_B, bias, scaling=0.7, dropout_p=dropout_p, seed=3)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_opcheck(backend):
    """Of backward also in part: dB alone, dx alone, dA alone.  An output that is not needed is empty, in the fake too."""
    x, weight, A, B, bias = inputs(M=9, requires_grad=False).values()
    seed, dy, S = torch.tensor([5]), torch.randn(9, 40), torch.randn(9, 4)
    mask = packed_mask(seed, 9, 24, 0.25) if backend == "torch" else seed
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    torch.library.opcheck(forward, (x, weight, A, B, bias, seed, 0.5, 0.25, backend))  # raises
    torch.library.opcheck(forward, (x, weight, A, B, None, None, 0.5, 0.0, backend))
    dB, dx, dA = (None, None, None, None, S, None), (None, weight, A, B, None, mask), (x, None, None, B, None, mask)
    for operands in ((x, weight, A, B, S, mask), dB, dx, dA):
        torch.library.opcheck(backward, (dy, *operands, 0.5, 0.25, torch.float32, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    "outputs",
    [("dx",), ("dA",), ("dB",), ("dbias",), ("dx", "dA"), ("dx", "dB"), ("dA", "dB"), ("dA", "dB", "dbias"), ("y",)],
    ids="-".join,
)
def test_gradients_one_by_one(backend, outputs, dropout_p):
    """Each subset that requires grad, right by the oracle: the others' inputs are not saved and not computed with."""
    oracle.assert_parity(Case((40, 56, 48), rank=4, dropout_p=dropout_p), backend=backend, outputs=outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_for_backward(backend):
    """x and the parameters by reference, S, and for the mask the seed or, on "torch", a bit an element; no copy of x."""
    t = inputs(M=96, K=64, N=80, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    saved = saved_by(lambda: lora_linear(*t.values(), dropout_p=0.1, backend=backend))
    shared = {t[name].data_ptr() for name in ("x", "weight", "lora_A", "lora_B")}
    assert shared <= {tensor.data_ptr() for tensor in saved}
    new = sorted((tuple(tensor.shape), tensor.dtype) for tensor in saved if tensor.data_ptr() not in shared)
    mask = ((96, 8), torch.uint8) if backend == "torch" else ((1,), torch.int64)
    assert new == [mask, ((96, 4), torch.float32)] or new == [((96, 4), torch.float32), mask]


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (("x",), {"weight", "lora_A", "lora_B", "mask"}),
        (("lora_A",), {"x", "lora_B", "mask"}),
        (("lora_B",), {"S"}),
        (("bias",), set()),
        (("lora_A", "lora_B"), {"x", "lora_B", "S", "mask"}),
    ],
)
def test_only_what_backward_needs_is_saved(trained, expected):
    t = inputs(M=96, K=64, N=80, requires_grad=False)
    for name in trained:
        t[name].requires_grad_()
    names = {tuple(t[name].shape): name for name in NAMES} | {(96, 4): "S", (96, 8): "mask"}
    assert {names[tuple(tensor.shape)] for tensor in saved_by(lambda: lora_linear(*t.values(), dropout_p=0.1))} == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_saved_tensors_are_not_written(backend):
    t = inputs()
    y = lora_linear(*t.values(), dropout_p=0.1, backend=backend)
    tensors = [*t.values(), torch.randn_like(y)]
    before = [tensor.detach().clone() for tensor in tensors]
    leaves = [t[name] for name in NAMES if name != "weight"]
    assert all_equal(*(torch.autograd.grad(y, leaves, tensors[-1], retain_graph=True) for _ in range(2)))
    assert all_equal(tensors, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24,), (3, 11, 24), (2, 0, 24)], ids=str)
def test_any_leading_dimensions(backend, shape):
    """y and the gradients are those of the rows laid out flat, trainable bias included."""
    results = []
    for flat in (False, True):
        t = inputs()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        x = (x.view(-1, 24) if flat else x).requires_grad_()
        y = lora_linear(x, *[t[name] for name in NAMES[1:]], dropout_p=0.3, seed=1, backend=backend)
        assert y.shape == (*x.shape[:-1], 40)
        y.square().sum().backward()
        results.append([y.flatten(), x.grad.flatten(), *grads(t)[1:]])
    assert all_equal(*results)


def test_backward_operator_takes_any_strides():
    dy, S, B = torch.randn(33, 40), torch.randn(4, 33).t(), torch.randn(40, 4)
    results = [
        torch.ops.fastlora.lora_linear_backward(dy, None, None, None, B, S, None, 0.5, 0.0, torch.float32, backend)[2]
        for backend in BACKENDS
    ]
    exact = 0.5 * dy.double().t() @ S.double()
    assert all(oracle.relative_error(dB, exact) <= oracle.FLOOR[torch.float32, torch.float32] for dB in results)


def test_seed_decides_the_mask():
    t = inputs(requires_grad=False)

    def call(**keywords):
        return lora_linear(*t.values(), dropout_p=0.5, **keywords)

    assert all_equal([call(seed=torch.tensor([7])), call(seed=torch.tensor(7))], [call(seed=7)] * 2)
    assert not torch.equal(call(seed=7), call(seed=8))
    assert not torch.equal(call(), call())


def test_no_dropout_draws_no_seed():
    t = inputs(requires_grad=False)
    state = torch.get_rng_state()
    plain = lora_linear(*t.values())
    assert torch.equal(lora_linear(*t.values(), dropout_p=0.5, training=False, seed=7), plain)
    assert torch.equal(lora_linear(*t.values(), dropout_p=1e-6), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_zero_is_the_frozen_linear():
    t = inputs(r=0)
    assert torch.equal(lora_linear(*t.values(), dropout_p=0.5), torch.nn.functional.linear(t["x"], t["weight"], t["bias"]))


@pytest.mark.parametrize(("backend", "dropout_p"), [*((backend, 0.5) for backend in BACKENDS), ("torch", 0.0)])
def test_compile_in_one_graph(backend, dropout_p):
    """fullgraph, dynamic shapes, forward and backward: the same values as eager, at two sizes."""
    torch._dynamo.reset()

    def call(x, weight, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, bias, scaling=0.5, dropout_p=dropout_p, backend=backend).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (33, 17):
        results = []
        for function in (call, compiled):
            t = inputs(M=M)
            torch.manual_seed(2)
            y = function(*t.values())
            y.square().sum().backward()
            results.append([y.detach(), *grads(t)])
        assert all_equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(backend, dtype):
    t = inputs(M=64)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(*t.values(), dropout_p=0.2, seed=4, backend=backend)
        y.float().square().sum().backward()  # autocast is still on: S and dS must stay float32 inside
    assert y.dtype == torch.nn.functional.linear(t["x"].to(dtype), t["weight"].to(dtype)).dtype
    cast = {name: tensor.detach().to(dtype).requires_grad_(name != "weight") for name, tensor in t.items()}
    expected = lora_linear(*cast.values(), dropout_p=0.2, seed=4, backend=backend)
    expected.float().square().sum().backward()
    assert torch.equal(y, expected)
    assert {grad.dtype for grad in grads(t)} == {torch.float32}
    assert all_equal(grads(t), [grad.float() for grad in grads(cast)])


def test_backward_in_another_thread():
    """autograd's own threads, and data-parallel wrappers, run backward where no context manager of forward is active."""
    t = inputs()
    y = lora_linear(*t.values(), dropout_p=0.1, seed=3)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert all(grad is not None for grad in grads(t))


@pytest.mark.parametrize("length", [1, 16, 100])
def test_the_mask_does_not_depend_on_how_rows_are_cut(monkeypatch, length):
    monkeypatch.setattr(rows, "_CPU_CHUNK", length * 40 // torch.get_num_threads())
    assert len(rows.chunks(torch.empty(70, 40))) == -(-70 // length)
    oracle.assert_parity(Case((70, 40, 24), rank=4, dropout_p=0.3), backend="torch")
