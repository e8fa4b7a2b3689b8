"""The compiled kernels on this machine's GPU: pytest -m gpu."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pytest
import torch
from grouped import Group, fused
from planned import DTYPES, run_grad_a, run_pack_bits

from fastlora import FusedLoraLinear, Projection, dropout_mask, lora_linear, lora_linears, lora_mlp, oracle
from fastlora.kernels.target import target_of
from fastlora.oracle import Case

pytestmark = pytest.mark.gpu
T = TypeVar("T")

SHAPES = [(1, 64, 64), (17, 131, 77), (512, 1024, 4096), (2048, 4096, 1024), (4096, 512, 2048), (4099, 2053, 1030)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64, 128, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_parity(dtype, adapter_dtype, shape, rank, dropout_p):
    case = Case(shape, rank=rank, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    for backend in ("fused", "addmm", "torch"):
        oracle.assert_parity(case, backend=backend, device="cuda")


@pytest.mark.parametrize("backend", ["fused", "addmm", "torch"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(17, 131), (2048, 1024), (4099, 2053)], ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_projections(dtype, adapter_dtype, shape, dropout_p, backend):
    members = [(512, 16, dropout_p, True), (128, 16, dropout_p, False), (136, 5, dropout_p, True)]
    group = Group(*members, dtype=dtype, adapter_dtype=adapter_dtype, shape=shape, device="cuda")
    group.assert_parity(fused(group, backend))


@pytest.mark.parametrize("rows", [1, 64, 65, 512, 8192])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_chosen_form(rows, dropout_p):
    oracle.assert_parity(Case((rows, 4096, 4096), rank=16, dtype=torch.bfloat16, dropout_p=dropout_p), device="cuda")


@pytest.mark.parametrize("view", [lambda t: t[::2], lambda t: t[:, :-1], lambda t: t.t().contiguous().t()])
def test_strided_x(view):
    inputs = oracle.draw(Case((256, 513, 264), rank=8, dtype=torch.bfloat16), device="cuda")
    x = view(inputs.x)
    cols = x.shape[1]
    y = lora_linear(x, inputs.weight[:, :cols], inputs.lora_A[:, :cols], inputs.lora_B, inputs.bias)
    plain = lora_linear(x.contiguous(), inputs.weight[:, :cols], inputs.lora_A[:, :cols], inputs.lora_B, inputs.bias)
    assert oracle.relative_error(y, plain.double()) <= oracle.FLOOR[torch.bfloat16, torch.bfloat16]


def test_mask_is_the_same_on_both_devices():
    assert torch.equal(dropout_mask(11, 500, 333, 0.3, device="cuda").cpu(), dropout_mask(11, 500, 333, 0.3))


@pytest.mark.parametrize("backend", ["fused", "addmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype, backend):
    case = Case((4096, 2048, 2048), rank=16, dtype=dtype, dropout_p=0.1)
    inputs = oracle.draw(case, device="cuda")
    run = partial(lora_linear, backend=backend)
    first, second = (oracle.evaluate(run, case, inputs, case.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in case.outputs)


def test_kernels_draw_the_bits_of_the_mask():
    seed = torch.tensor([2**40 + 5], device="cuda")
    expected = dropout_mask(seed, 500, 333, 0.3)
    x, U = torch.randn(500, 333, device="cuda"), torch.randn(500, 4, device="cuda")
    _, from_dA = run_grad_a(x, U, torch.float32, target_of(x.device), pack=True, seed=seed, dropout_p=0.3)
    shifts = torch.arange(8, device="cuda")
    for bits in (run_pack_bits(seed, 500, 333, 0.3), from_dA):
        unpacked = (bits.unsqueeze(2) >> shifts & 1).bool().flatten(1)[:, :333]
        assert torch.equal(unpacked, expected)


@pytest.fixture
def restored_switch() -> Iterator[None]:
    """Restores torch's switch for float32 products. monkeypatch would delete it."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("restored_switch")
@pytest.mark.parametrize("backend", ["fused", "addmm"])
def test_tf32_follows_torch(backend):
    """With torch's switch on, float32 products lose 13 bits, in fastlora as in eager torch. With it off they keep them."""
    case = Case((512, 1024, 768), rank=16, dropout_p=0.1)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert max(row.error for row in oracle.assert_parity(case, backend=backend, device="cuda")) > 2e-5
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert max(row.error for row in oracle.assert_parity(case, backend=backend, device="cuda")) < 2e-6


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of step(), and the tensors that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


#: What is called with x, a projection in -> out and one out -> in, and returns its results.
CALLS: dict[str, Callable[..., Sequence[torch.Tensor]]] = {
    "linear": lambda x, up, down, **options: (lora_linear(x, *up[:4], dropout_p=up.dropout_p, **options),),
    "projections": lambda x, up, down, **options: lora_linears(x, [up, up], **options),
    "mlp": lambda x, up, down, **options: (lora_mlp(x, up, up, down, **options),),
}


def step_of(call: str, backend: str, seed: torch.Tensor | None, device: str = "cuda") -> Callable[[], list[torch.Tensor]]:
    """A step that returns y and the gradients, with masks from `seed`, or from a seed that each call draws."""
    inputs = oracle.draw(Case((128, 256, 512), rank=8, dtype=torch.bfloat16), device=device)
    x, A, B = (t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    up = Projection(inputs.weight, A, B, dropout_p=0.5)
    down = Projection(inputs.weight.t(), B.detach().t(), A.detach().t(), dropout_p=0.5)

    def step() -> list[torch.Tensor]:
        ys = CALLS[call](x, up, down, seed=seed, backend=backend)
        return [*ys, *torch.autograd.grad(ys, (x, A, B), [y.detach() for y in ys])]

    return step


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["fused", "addmm"])
def test_a_replay_follows_its_seed(call, backend):
    """A replay with a new seed gives, bit for bit, what an eager step with that seed gives."""
    seed = torch.tensor([1], device="cuda")
    step = step_of(call, backend, seed)
    graph, results = captured(step)
    for value in (7, 8):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["fused", "addmm"])
def test_each_replay_draws_its_own_mask(call, backend):
    """The step draws its seed inside the graph. Each replay takes the generator's next seed, as an eager step does."""
    step = step_of(call, backend, None)
    graph, results = captured(step)
    for start in (7, 8):
        torch.cuda.manual_seed(start)
        graph.replay()
        first = [result.clone() for result in results]
        graph.replay()
        assert not any(torch.equal(a, b) for a, b in zip(first, results, strict=True))
        torch.cuda.manual_seed(start)
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_compile():
    layer = FusedLoraLinear(256, 512, r=8, lora_dropout=0.1, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        with torch._inductor.config.patch(fallback_random=True):  # Inductor's generator would draw another seed
            torch.manual_seed(0)
            y = function(x)
        y.backward(dy)
        results.append((y.detach(), layer.lora_A.grad.clone()))
        layer.zero_grad()
    assert all(torch.equal(eager, inductor) for eager, inductor in zip(*results, strict=True))
