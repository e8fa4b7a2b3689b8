"""Packed weights of torchao, HQQ, GPTQModel and transformers: what they stand for, what is saved, what is refused."""

import pytest
import torch
from packed_layers import FORMATS, BaseQuantLinear, gptqmodel, packed, stand_ins, torchao
from quantized_layers import adapter, saved_by_reference, size
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from fastlora import lora_linear, oracle
from fastlora.quantized import is_quantized, read, unsupported_input, weight_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _stand_ins():
    with stand_ins():
        yield


def random_layer(name: str, dtype: torch.dtype = F32, N: int = 48, K: int = 64):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    return packed(name, weight)


@pytest.mark.parametrize("name", FORMATS)
def test_dense_weight_is_the_librarys(name):
    """In every dtype, contiguous; the fake tensor of the operator agrees."""
    layer, dense = random_layer(name)
    weight = weight_of(layer)
    assert tuple(weight.shape) == dense.shape
    for dtype in (F32, F16, BF16):
        W = weight.dequantize(dtype)
        assert W.dtype == dtype
        assert oracle.relative_error(W, dense.double()) <= max(oracle.FLOOR[dtype, dtype], 1e-6)
    arguments = (weight.packed, list(weight.statistics), *weight.scheme, BF16, torch.randn(3))
    # The schema's test compares inputs before and after, which torch cannot do with float8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(torch.ops.fastlora.dequantize, arguments, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["torchao int8", "torchao float8", "torchao int4", "hqq 3 axis 1", "hqq 4 axis 0"])
def test_dense_weight_in_the_librarys_dtype_is_bit_for_bit_its_own(name):
    layer, dense = random_layer(name, BF16)
    assert torch.equal(weight_of(layer).dequantize(BF16).float(), dense)


@pytest.mark.parametrize("name", ["torchao int8", "torchao float8", "hqq 4 axis 1", "gptq 4", "awq", "fp8 blocks"])
def test_saved_for_backward(name):
    """x, S, A, B and the packed weight with its statistics, by reference."""
    layer, _ = random_layer(name, BF16)
    weight = weight_of(layer)
    x, (A, B) = torch.randn(8, 64, requires_grad=True), adapter(48, 64)
    saved_by_reference(weight, x, A, B)
    assert size((weight.packed, *weight.statistics)) <= 48 * 64 * (
        1.2 if weight.packed.element_size() == 1 and "4" not in name else 0.8
    )


@pytest.mark.parametrize("name", ["torchao int8", "hqq 4 axis 1", "gptq act order", "fp8 blocks"])
def test_compile_in_one_graph(name):
    torch._dynamo.reset()
    layer, _ = random_layer(name)
    A, B = adapter(48, 64)

    def call(x):
        return lora_linear(x, weight_of(layer), A, B, dropout_p=0.2, seed=3)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    x = torch.randn(7, 64, requires_grad=True)
    results = compiled(x), call(x)
    assert torch.equal(*results)
    grads = [torch.autograd.grad(y.sum(), (x, A, B)) for y in results]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layers_of_no_format():
    class Altered(FP8Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    marlin = BaseQuantLinear(torch.randn(4, 4), 4, 4, False)
    for linear in (nn.Linear(4, 4), Altered(4, 4), marlin):
        assert read(linear) is None
        with pytest.raises(TypeError, match=f"linear must be a quantised layer of .*, got {type(linear).__name__}$"):
            weight_of(linear)


def int4() -> nn.Module:
    """A weight of torchao's for kernels that PEFT cannot train through; `quantize_` would need a GPU."""
    Int4Tensor = pytest.importorskip("torchao.quantization").Int4Tensor
    scale = torch.ones(1, 16)
    weight = Int4Tensor(torch.zeros(16, 8, dtype=torch.uint8), scale, scale, [1, 16], torch.Size((16, 16)))
    return changed(nn.Linear(16, 16), weight=nn.Parameter(weight, requires_grad=False))


def changed(layer: nn.Module, **values: object) -> nn.Module:
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: torchao(torch.randn(16, 16), "Int8DynamicActivationInt8WeightConfig")[0], "rounds or scales its input too"),
        (lambda: int4(), "has a weight of torchao's Int4Tensor"),
        (lambda: changed(random_layer("hqq 4 axis 1")[0], ready=False), "is not quantised and packed yet"),
        (lambda: changed(gptqmodel(torch.randn(16, 16), "gptq")[0], bits=3), "packs 3 bits into torch.int32"),
        (lambda: changed(gptqmodel(torch.randn(16, 16), "gptq")[0], online_full_had=True), "rotates its input"),
        (lambda: FP8Linear(16, 16, activation_scheme="static"), "rounds its input with a fixed scale"),
        (lambda: changed(FP8Linear(16, 16), weight=nn.Parameter(torch.randn(16, 16))), "keeps its weight in torch.float32"),
    ],
)
def test_recognised_but_not_supported(layer, reason):
    layer = layer()
    assert reason in read(layer)
    assert unsupported_input(layer, torch.randn(3, 16)) == read(layer)
    with pytest.raises(ValueError, match=f"linear is a {type(layer).__name__} that {reason}"):
        weight_of(layer)


@pytest.mark.parametrize(
    ("name", "x", "autocast", "taken"),
    [
        *[(name, BF16, None, True) for name in ("torchao int8", "hqq 4 axis 1", "gptq 4", "fp8 blocks")],
        *[(name, BF16, BF16, True) for name in ("torchao int8", "gptq 4")],
        *[(name, F32, None, name[:4] in ("gptq", "fp8 ")) for name in ("torchao int8", "hqq 4 axis 1", "gptq 4", "fp8 blocks")],
        *[(name, F32, BF16, False) for name in ("torchao float8", "hqq 4 axis 1", "gptq 4", "fp8 blocks")],
    ],
)
def test_dtypes_of_a_call(name, x, autocast, taken):
    """x has what the layer computes in: the dtype of torchao's tensor, HQQ's compute dtype, any for the others."""
    layer, _ = random_layer(name, BF16)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        reason = unsupported_input(layer, torch.randn(3, 64).to(x))
    assert (reason is None) == taken
    assert taken or f"on an input in {x}" in reason


def test_bitsandbytes_is_what_is_quantized_means():
    """`inject` and FusedLoraLinear4bit take those of bitsandbytes only."""
    assert not is_quantized(gptqmodel(torch.randn(16, 16), "gptq")[0])
