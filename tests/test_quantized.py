"""4-bit and 8-bit weights of the real bitsandbytes: what they stand for, what is saved, and parity with its own layers."""

import re
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import dropout_mask, lora_linear, oracle, reference
from fastlora.dropout import keep_scale
from fastlora.oracle import Case
from fastlora.quantized import QuantizedWeight, is_quantized, weight_of, why_not

BACKENDS = ("triton", "torch")
KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4 double": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}
DTYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]


def quantize(weight: torch.Tensor, kind: str, bias: torch.Tensor | None = None, **options) -> nn.Module:
    """A layer of bitsandbytes on `weight` (out, in); options: blocksize, quant_storage, compute_dtype of a 4-bit one."""
    out_features, in_features = weight.shape
    if kind == "int8":
        layer = Linear8bitLt(in_features, out_features, bias=bias is not None, has_fp16_weights=False)
        layer.weight = Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(in_features, out_features, bias=bias is not None, compute_dtype=options.pop("compute_dtype", None))
        layer.weight = Params4bit(weight.detach().clone(), requires_grad=False, module=layer, **KINDS[kind], **options)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to("cpu")


def random_layer(kind: str, N: int = 40, K: int = 24, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(N, K, generator=generator).to(dtype), kind, **options)


def adapter(N: int, K: int, r: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(r, K, generator=generator) / K**0.5, torch.randn(N, r, generator=generator)
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def by_definition(layer: nn.Module) -> torch.Tensor:
    """The dense weight in float64, by the formulas of the module's docstring, one element after another."""
    if isinstance(layer, Linear8bitLt):
        return (
            layer.weight.data.double() * (layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB)[:, None] / 127
        )
    state = layer.weight.quant_state
    codes = layer.weight.data.contiguous().view(torch.uint8).flatten().long()
    codes = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[: state.shape.numel()]
    absmax = state.absmax.double()
    if state.nested:
        index = torch.arange(len(absmax)) // state.state2.blocksize
        absmax = state.state2.code.double()[state.absmax.long()] * state.state2.absmax.double()[index] + state.offset
    blocks = torch.arange(len(codes)) // state.blocksize
    return (state.code.double()[codes] * absmax[blocks]).view(state.shape)


# The dense weight.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 24), (33, 65), (64, 64), (129, 70), (300, 259), (1, 2)], ids=str)
def test_dense_weight_is_the_definition(kind, shape):
    """Rows that end within a block, odd sizes, and enough blocks for two of double quantisation; in every dtype."""
    layer = random_layer(kind, *shape)
    weight = weight_of(layer)
    assert tuple(weight.shape) == shape
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


@pytest.mark.parametrize("kind", KINDS)
def test_weight_shares_the_layers_storage(kind):
    layer = random_layer(kind)
    assert weight_of(layer).packed.data_ptr() == layer.weight.data_ptr()


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


def dense(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What `weight` is once quantised, in float32; the same for its float64 copy."""
    return weight_of(quantize(weight.float(), kind)).dequantize(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_reference(kind, dropout_p, dtype, adapter_dtype, backend):
    """Against the eager computation on the dense weight, made in float32 and rounded once: ragged rows, bias, every gradient."""

    def fused(x, weight, *tensors, **options):
        return lora_linear(x, weight_of(quantize(weight.float(), kind)), *tensors, backend=backend, **options)

    def expected(x, weight, *tensors, **options):
        return oracle.masked_reference()(x, dense(weight, kind).to(x.dtype), *tensors, **options)

    case = Case((19, 70, 33), rank=3, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    oracle.assert_parity(case, fused, expected=expected)


class Masked(nn.Module):
    """PEFT's dropout with fastlora's mask."""

    def __init__(self, seed: int, p: float) -> None:
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * dropout_mask(self.seed, len(x), x.shape[1], self.p) * keep_scale(self.p)


def peft_layer(layer: nn.Module, r: int, scaling: float) -> nn.Module:
    """PEFT's own layer on a layer of bitsandbytes."""
    from peft import LoraConfig
    from peft.tuners.lora import bnb

    kind = bnb.Linear8bitLt if isinstance(layer, Linear8bitLt) else bnb.Linear4bit
    return kind(layer, "default", config=LoraConfig(r=r, lora_alpha=scaling * r), r=r, lora_alpha=scaling * r)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_pefts_own_layer(kind, dropout_p, dtype, adapter_dtype):
    """In float64 on the dense weight, no more than twice as far off as PEFT's layer on bitsandbytes' own."""

    def fused(x, weight, *tensors, **options):
        return lora_linear(x, weight_of(quantize(weight.float(), kind)), *tensors, **options)

    def expected(x, weight, A, B, bias, *, scaling, dropout_p, seed):
        if x.dtype == torch.float64:
            options = {"scaling": scaling, "dropout_p": dropout_p, "seed": seed}
            return oracle.masked_reference()(x, dense(weight, kind).double(), A, B, bias, **options)
        layer = peft_layer(quantize(weight.float(), kind, bias), len(A), scaling)
        if dropout_p:
            layer.lora_dropout["default"] = Masked(seed, dropout_p)
        tensors = {"lora_A.default.weight": A, "lora_B.default.weight": B, "base_layer.bias": bias}
        return torch.func.functional_call(layer, tensors, x)

    case = Case((19, 70, 33), rank=3, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    rows = oracle.assert_parity(case, fused, expected=expected)
    assert all(row.eager < 0.02 for row in rows), "PEFT's layer computes something else"


def test_8_bit_forward_is_nearer_than_llm_int8():
    """In evaluation bitsandbytes rounds x to 8 bits as well."""
    layer = random_layer("int8").eval()
    x = torch.randn(64, 24)
    A, B = adapter(40, 24)
    exact = reference.lora_linear(*(t.detach().double() for t in (x, by_definition(layer), A, B)))
    own = layer(x) + x @ A.t() @ B.t()
    fused = lora_linear(x, weight_of(layer), A, B)
    assert oracle.relative_error(fused.detach(), exact) <= oracle.FLOOR[torch.float32, torch.float32]
    assert oracle.relative_error(own.detach(), exact) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_rank_zero_is_the_frozen_layer(kind, backend):
    weight = weight_of(random_layer(kind))
    x = torch.randn(5, 24, requires_grad=True)
    y = lora_linear(x, weight, torch.empty(0, 24), torch.empty(40, 0), torch.ones(40), backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    W = weight.dequantize(torch.float32).double()
    assert oracle.relative_error(y.detach(), x.detach().double() @ W.t() + 1) <= oracle.FLOOR[torch.float32, torch.float32]
    assert oracle.relative_error(dx, W.sum(0).expand(5, 24)) <= oracle.FLOOR[torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    weight = weight_of(random_layer("nf4 double"))
    x, (A, B) = torch.randn(9, 24, requires_grad=True), adapter(40, 24)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(x, weight, A, B)
    cast = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
    expected = lora_linear(cast[0], weight, *cast[1:])
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for leaf, grad in zip((x, A, B), torch.autograd.grad(expected.float().sum(), cast), strict=True):
        (own,) = torch.autograd.grad(y.float().sum(), leaf, retain_graph=True)
        assert torch.equal(own, grad.float())


# What is kept.


def saved_tensors(call) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call()
    return saved


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_for_backward(kind):
    """x, S, A, B and the packed weight, by reference; with double quantisation the 1 KiB of its codebook."""
    layer = random_layer(kind, 256, 192)
    weight = weight_of(layer)
    x, (A, B) = torch.randn(8, 192, requires_grad=True), adapter(256, 192)
    saved = saved_tensors(lambda: lora_linear(x, weight, A, B))
    known = (x, A, B, weight.packed, *weight.statistics)
    storages = [tensor.untyped_storage().data_ptr() for tensor in known]
    (S,) = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in storages]
    assert S.shape == (8, 4)
    assert size(saved) == size((*known, S))
    bits = 8 if kind == "int8" else 4
    assert size((weight.packed, *weight.statistics)) <= 256 * 192 * (bits + 0.6) / 8 + 2048


def test_weight_is_saved_only_where_dx_needs_it():
    weight = weight_of(random_layer("nf4 double"))
    A, B = adapter(40, 24)
    saved = saved_tensors(lambda: lora_linear(torch.randn(8, 24), weight, A, B))
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


# torch.compile and torch.library.


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    weight = weight_of(random_layer(kind))
    for after in (None, torch.randn(3)):
        arguments = (weight.packed, list(weight.statistics), *weight.scheme, torch.bfloat16, after)
        assert set(torch.library.opcheck(torch.ops.fastlora.dequantize, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_in_one_graph_saves_the_packed_weight(kind, compiler):
    """Reading the layer included; the second compiler moves work between forward and backward as inductor does."""
    torch._dynamo.reset()
    layer = random_layer(kind, 48, 32)
    A, B = adapter(48, 32)

    def call(x):
        return lora_linear(x, weight_of(layer), A, B, dropout_p=0.2, seed=3).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for M in (7, 5):
        x = torch.randn(M, 32, requires_grad=True)
        y = call(x)
        saved = saved_tensors(lambda x=x: compiled(x))
        assert torch.equal(compiled(x), y)
        assert all(tensor.numel() < 48 * 32 or tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved)
        assert any(tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved)
        grads = [torch.autograd.grad(result.sum(), (x, A, B)) for result in (y, compiled(x))]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# Which layers, which calls, which inputs.


def test_fastlora_does_not_import_bitsandbytes():
    code = (
        "import sys, torch, fastlora.quantized as q\n"
        "assert not q.is_quantized(torch.nn.Linear(2, 2))\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_what_is_a_quantised_layer():
    class Altered(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    assert is_quantized(bitsandbytes.nn.LinearNF4(4, 4))
    assert is_quantized(Linear8bitLt(4, 4))
    assert not is_quantized(nn.Linear(4, 4))
    assert not is_quantized(Altered(4, 4))
    with pytest.raises(TypeError, match="Linear4bit or Linear8bitLt, got Linear$"):
        weight_of(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Linear4bit(4, 4), "is not quantised yet: move it to a device first"),
        (Linear8bitLt(4, 4, has_fp16_weights=False), "is not quantised yet: move it to a device first"),
        (Linear8bitLt(4, 4).to("cpu"), "keeps its weight in 16 bits (has_fp16_weights=True)"),
    ],
    ids=["4 bit", "8 bit", "16 bit"],
)
def test_weights_that_are_not_packed(layer, reason):
    assert is_quantized(layer)
    assert why_not(layer, torch.randn(3, 4)) == reason
    with pytest.raises(ValueError, match=re.escape(f"linear is a {type(layer).__name__} that {reason}")):
        weight_of(layer)


def test_weight_laid_out_for_inference_is_left_alone():
    """bitsandbytes does that on CPUs with AVX512-BF16; it is imitated here, so that every machine tests it."""
    layer = random_layer("nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    assert why_not(layer, torch.randn(3, 24)) == "has laid its weight out for inference on this CPU"
    with pytest.raises(ValueError, match="has laid its weight out for inference"):
        weight_of(layer)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("compute", "x", "autocast", "taken"),
    [
        (None, F32, None, True),
        (None, BF16, None, True),
        (BF16, BF16, None, True),
        (BF16, F32, None, False),  # the adapter would see x unrounded
        (F32, BF16, None, False),
        (BF16, BF16, BF16, True),
        (BF16, F32, BF16, True),
        (None, F32, BF16, False),  # the base would be computed in float32
        (F16, F32, BF16, False),
        (BF16, F16, BF16, False),
        (BF16, BF16, F16, False),
    ],
)
def test_dtypes_of_a_call(compute, x, autocast, taken):
    """Taken where PEFT's layer on it computes the same, in the same output dtype; the reason otherwise names the dtypes."""
    layer = random_layer("nf4", compute_dtype=compute)
    tensor = torch.randn(300, 24).to(x)
    A, B = adapter(40, 24)
    own = peft_layer(layer, 4, 1.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        reason = why_not(layer, tensor)
        assert (reason is None) == taken
        if not taken:
            assert f"on an input in {x}" in reason
            return
        tensors = {"lora_A.default.weight": A, "lora_B.default.weight": B}
        expected = torch.func.functional_call(own, tensors, tensor)
        y = lora_linear(tensor, weight_of(layer), A, B).to(x)
    exact = reference.lora_linear(*(t.detach().double() for t in (tensor, by_definition(layer), A, B)))
    assert y.dtype == expected.dtype
    bound = max(2 * oracle.relative_error(expected, exact), oracle.FLOOR[x, x])
    assert oracle.relative_error(y, exact) <= bound


def test_few_rows_without_gradient_are_bitsandbytes_own_off_the_cpu():
    layer = random_layer("nf4")
    reason = "multiplies few rows straight from its packed weight where no gradient is recorded"
    with torch.no_grad():
        assert why_not(layer, torch.empty(4, 300, 24, device="meta")) == reason
        assert why_not(layer, torch.empty(6, 300, 24, device="meta")) is None
        assert why_not(layer, torch.empty(4, 300, 24)) is None
    assert why_not(layer, torch.empty(4, 300, 24, device="meta")) is None


def test_evaluation_leaves_the_layer_as_it_was():
    """On a CPU bitsandbytes' own forward may lay the weight out anew, after which x would get no gradient from the base."""
    layer = random_layer("nf4 double", 64, 64).eval()
    before = layer.weight.data.clone()
    with torch.no_grad():
        lora_linear(torch.randn(3, 64), weight_of(layer), *adapter(64, 64))
    assert torch.equal(layer.weight.data, before)
    assert why_not(layer, torch.randn(3, 64)) is None


def test_bad_input():
    weight = weight_of(random_layer("nf4"))
    x, (A, B) = torch.randn(3, 24), adapter(40, 24)
    double = [t.detach().double() for t in (x, A, B)]
    with pytest.raises(TypeError, match="x is torch.float64, but a quantised weight can be made in"):
        lora_linear(double[0], weight, *double[1:])
    with pytest.raises(ValueError, match=r"weight \(40, 24\) expects its last dimension to be 24"):
        lora_linear(torch.randn(3, 23), weight, A, B)
    with pytest.raises(ValueError, match="weight is on meta, but x is on cpu"):
        elsewhere = QuantizedWeight(weight.packed.to("meta"), weight.statistics, weight.scheme)
        lora_linear(x, elsewhere, A, B)
    with pytest.raises(TypeError, match="got torch.uint8; dequantise it first, or pass a QuantizedWeight"):
        lora_linear(x, weight.packed, A, B)
    with pytest.raises(TypeError, match="weight must be a torch.Tensor, got SimpleNamespace"):
        lora_linear(x, SimpleNamespace(shape=(40, 24)), A, B)
