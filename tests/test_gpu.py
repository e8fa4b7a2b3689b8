"""The compiled kernels on this machine's GPU: pytest -m gpu."""

from functools import partial

import pytest
import torch

from fastlora import FusedLoraLinear, dropout_mask, lora_linear, oracle
from fastlora.oracle import Case

pytestmark = pytest.mark.gpu

DTYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
SHAPES = [(1, 64, 64), (17, 131, 77), (512, 1024, 4096), (2048, 4096, 1024), (4099, 2053, 1030)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64, 128, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_parity(dtype, adapter_dtype, shape, rank, dropout_p):
    case = Case(shape, rank=rank, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    oracle.assert_parity(case, backend="triton", device="cuda")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype):
    case = Case((4096, 2048, 2048), rank=16, dtype=dtype, dropout_p=0.1)
    inputs = oracle.draw(case, device="cuda")
    run = partial(lora_linear, backend="triton")
    first, second = (oracle.evaluate(run, case, inputs, case.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in case.outputs)


def test_graph_capture_redraws_the_mask_at_each_replay():
    layer = FusedLoraLinear(256, 512, r=8, lora_dropout=0.5, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    x.grad = None
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    results = []
    for _ in range(2):
        graph.replay()
        results.append((y.clone(), layer.lora_A.grad.clone()))
    assert not torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
    assert all(torch.isfinite(tensor).all() for result in results for tensor in result)


def test_compile():
    layer = FusedLoraLinear(256, 512, r=8, lora_dropout=0.1, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        with torch._inductor.config.patch(fallback_random=True):  # Inductor's own generator would draw another seed
            torch.manual_seed(0)
            y = function(x)
        y.sum().backward()
        results.append((y.detach(), layer.lora_A.grad.clone()))
        layer.zero_grad()
    assert all(torch.equal(eager, inductor) for eager, inductor in zip(*results, strict=True))
