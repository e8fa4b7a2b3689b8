"""4-bit and 8-bit weights of the real bitsandbytes: what they stand for, gradients, what is saved, compiled graphs."""

from types import SimpleNamespace

import pytest
import torch
from quantized_layers import KINDS, adapter, by_definition, random_layer, saved_by_reference, size
from saved import saved_by
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import lora_linear, oracle
from fastlora.quantized import QuantizedWeight, _dequantize, weight_of

BACKENDS = ("triton", "torch")
# The dense weight.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 24), (33, 65), (64, 64), (131, 129), (1, 2)], ids=str)
def test_dense_weight_is_the_definition(kind, shape):
    """Rows that end within a block, odd sizes, and enough blocks for two of double quantisation; in every dtype."""
    layer = random_layer(kind, *shape)
    weight = weight_of(layer)
    assert tuple(weight.shape) == shape
    assert weight.packed.data_ptr() == layer.weight.data_ptr()
    exact = by_definition(layer)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        dense = weight.dequantize(dtype)
        assert dense.dtype == dtype
        assert oracle.relative_error(dense, exact) <= max(oracle.FLOOR[dtype, dtype], 1e-6)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_dense_weight_whatever_the_storage(storage, blocksize):
    """The dtype that packed bits are kept in for FSDP, and that of the weight before quantisation, do not matter."""
    plain = random_layer("nf4 double", dtype=torch.bfloat16, blocksize=blocksize)
    layer = random_layer("nf4 double", dtype=torch.bfloat16, blocksize=blocksize, quant_storage=storage)
    assert layer.weight.dtype == storage
    dense = weight_of(layer).dequantize(torch.float32)
    assert torch.equal(dense, weight_of(plain).dequantize(torch.float32))
    assert oracle.relative_error(dense, by_definition(plain)) <= 1e-6


def test_8_bit_weight_before_and_after_the_first_forward():
    """The first forward moves CB and SCB from the weight to the layer's state; copying to a device moves them as well."""
    layer = random_layer("int8")
    before = weight_of(layer).dequantize(torch.float32)
    layer(torch.randn(3, 24))
    assert layer.weight.CB is None
    after = weight_of(layer)
    assert torch.equal(after.dequantize(torch.float32), before)
    assert after.packed.data_ptr() == layer.weight.data_ptr()


def test_4_bit_weight_replaced_by_a_wrapper():
    """FSDP puts a plain parameter in the weight's place; the layer has kept the state."""
    layer = random_layer("nf4 double")
    dense = weight_of(layer).dequantize(torch.float32)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(weight_of(layer).dequantize(torch.float32), dense)


# y and the gradients.


@pytest.mark.parametrize("backend", ["fused", "addmm", "torch"])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_rank_zero_is_the_frozen_layer(kind, backend):
    weight = weight_of(random_layer(kind))
    x = torch.randn(5, 24, requires_grad=True)
    factors = torch.empty(0, 24, requires_grad=True), torch.empty(40, 0, requires_grad=True)
    y = lora_linear(x, weight, *factors, torch.ones(40), backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    W = weight.dequantize(torch.float32).double()
    assert oracle.relative_error(y.detach(), x.detach().double() @ W.t() + 1) <= oracle.FLOOR[torch.float32, torch.float32]
    assert oracle.relative_error(dx, W.sum(0).expand(5, 24)) <= oracle.FLOOR[torch.float32, torch.float32]


def test_bias_of_another_dtype_is_cast():
    """As bitsandbytes does, but for the call alone; its gradient comes in its own dtype."""
    weight, (A, B) = weight_of(random_layer("nf4 double")), adapter(40, 24)
    x, bias = torch.randn(9, 24, dtype=torch.bfloat16), torch.randn(40, requires_grad=True)
    y = lora_linear(x, weight, A, B, bias)
    assert torch.equal(y, lora_linear(x, weight, A, B, bias.detach().bfloat16()))
    (dbias,) = torch.autograd.grad(y.float().sum(), bias)
    assert torch.equal(dbias, torch.full((40,), 9.0))


# What is kept.


@pytest.mark.parametrize("kind", KINDS)
def test_saved_for_backward(kind):
    """x, S, A, B and the packed weight, by reference; with double quantisation the 1 KiB of its codebook."""
    layer = random_layer(kind, 256, 192)
    weight = weight_of(layer)
    x, (A, B) = torch.randn(8, 192, requires_grad=True), adapter(256, 192)
    assert saved_by_reference(weight, x, A, B).shape == (8, 4)
    bits = 8 if kind == "int8" else 4
    assert size((weight.packed, *weight.statistics)) <= 256 * 192 * (bits + 0.6) / 8 + 2048


def test_weight_is_saved_only_where_dx_needs_it():
    weight = weight_of(random_layer("nf4 double"))
    A, B = adapter(40, 24)
    saved = saved_by(lambda: lora_linear(torch.randn(8, 24), weight, A, B))
    assert {tuple(tensor.shape) for tensor in saved} == {(8, 24), (40, 4), (8, 4)}


class DenseWeights(TorchDispatchMode):
    """Counts the storages of at least `numel` elements made under it, and how many of those live at once."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made, self.alive, self.most = numel, 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() >= self.numel:
                storage = StorageWeakRef(tensor.untyped_storage())
                self.alive = [other for other in self.alive if not other.expired()]
                if storage not in self.alive:
                    self.made += 1
                    self.alive.append(storage)
                self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_one_dense_weight_at_a_time(kind):
    """Three layers, forward and backward: six dense weights are made, one after another."""
    weights = [weight_of(random_layer(kind, 64, 64)) for _ in range(3)]
    A, B = adapter(64, 64)
    x = torch.randn(8, 64, requires_grad=True)
    with DenseWeights(64 * 64) as dense_weights:
        y = x
        for weight in weights:
            y = lora_linear(y, weight, A, B)
        assert all(storage.expired() for storage in dense_weights.alive)
        y.sum().backward()
    assert (dense_weights.made, dense_weights.most) == (6, 1)
    assert all(storage.expired() for storage in dense_weights.alive)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_made_in_its_dtype(kind):
    """Not by way of float32, which would take twice the memory again."""
    weight = weight_of(random_layer(kind, 64, 64))
    with DenseWeights(64 * 64) as dense_weights:
        _dequantize(weight.packed, weight.statistics, *weight.scheme, torch.bfloat16, None)
    assert dense_weights.made == 1


# torch.compile and torch.library.


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    weight = weight_of(random_layer(kind))
    for after in (None, torch.randn(3)):
        arguments = (weight.packed, list(weight.statistics), *weight.scheme, torch.bfloat16, after)
        assert set(torch.library.opcheck(torch.ops.fastlora.dequantize, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["fp4 double", "int8"])
def test_compile_in_one_graph_saves_the_packed_weight(kind):
    """Reading the layer included; the compiler moves work between forward and backward as inductor does."""
    torch._dynamo.reset()
    layer = random_layer(kind, 48, 32)
    A, B = adapter(48, 32)

    def call(x):
        return lora_linear(x, weight_of(layer), A, B, dropout_p=0.2, seed=3).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    for M in (7, 5):
        x = torch.randn(M, 32, requires_grad=True)
        y = call(x)
        saved = saved_by(lambda x=x: compiled(x))
        assert torch.equal(compiled(x), y)
        assert all(tensor.numel() < 48 * 32 or tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved)
        assert any(tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved)
        grads = [torch.autograd.grad(result.sum(), (x, A, B)) for result in (y, compiled(x))]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"bias": torch.zeros(40, dtype=torch.int32)}, TypeError, "bias must be float32"),
        ({"x": torch.randn(3, 24).double()}, TypeError, r"x is torch\.float64, but a quantised weight can be made in"),
        ({"device": "meta"}, ValueError, "weight is on meta, but x is on cpu"),
        ({"weight": SimpleNamespace(shape=(40, 24))}, TypeError, r"weight must be a torch\.Tensor, got SimpleNamespace"),
    ],
)
def test_bad_input(changed, error, message):
    weight, (A, B) = weight_of(random_layer("nf4")), adapter(40, 24)
    if device := changed.pop("device", None):
        weight = QuantizedWeight(weight.packed.to(device), weight.statistics, weight.scheme)
    arguments = {"x": torch.randn(3, 24), "weight": weight, "lora_A": A, "lora_B": B} | changed
    with pytest.raises(error, match=message):
        lora_linear(**arguments)
