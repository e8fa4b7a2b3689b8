"""Layers of bitsandbytes: parity with PEFT's on them, which are taken, and which of their calls."""

import re

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from planned import DTYPES
from quantized_layers import KINDS, adapter, by_definition, dense, quantize, random_layer
from torch import nn

from fastlora import lora_linear, oracle, reference
from fastlora.oracle import Case
from fastlora.quantized import is_quantized, unsupported_input, weight_of


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("kind", "dtype", "adapter_dtype"),
    [*((kind, torch.bfloat16, torch.float32) for kind in KINDS), *(("nf4 double", *dtypes) for dtypes in DTYPES[:-1])],
)
def test_as_accurate_as_a_dense_layer(kind, dtype, adapter_dtype, backend):
    """Ragged rows, bias, every gradient; large enough to be judged in one draw.  test_quantized_peft.py has PEFT's layers."""

    def fused(x, weight, *tensors, **options):
        return lora_linear(x, weight_of(quantize(weight.float(), kind)), *tensors, backend=backend, **options)

    def expected(x, weight, *tensors, **options):
        return oracle.masked_reference()(x, dense(weight, kind).to(x.dtype), *tensors, **options)

    case = Case((19, 70, 261), rank=4, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=0.2)
    oracle.assert_parity(case, fused, expected=expected)


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


def test_what_is_a_quantised_layer():
    class Altered(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    assert is_quantized(bitsandbytes.nn.LinearNF4(4, 4))
    assert is_quantized(Linear8bitLt(4, 4))
    assert not is_quantized(nn.Linear(4, 4))
    assert not is_quantized(Altered(4, 4))


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
    assert unsupported_input(layer, torch.randn(3, 4)) == reason
    with pytest.raises(ValueError, match=re.escape(f"linear is a {type(layer).__name__} that {reason}")):
        weight_of(layer)


def test_weight_laid_out_for_inference_is_left_alone():
    """bitsandbytes does that on CPUs with AVX512-BF16; it is imitated here, so that every machine tests it."""
    layer = random_layer("nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    assert unsupported_input(layer, torch.randn(3, 24)) == "has laid its weight out for inference on this CPU"
    with pytest.raises(ValueError, match="has laid its weight out for inference"):
        weight_of(layer)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("kind", "compute", "x", "autocast", "taken"),
    [
        ("nf4", None, F32, None, True),
        ("nf4", None, BF16, None, True),
        ("nf4", BF16, BF16, None, True),
        ("nf4", BF16, F32, None, False),  # the adapter would see x unrounded
        ("nf4", F32, BF16, None, False),
        ("nf4", BF16, BF16, BF16, True),
        ("nf4", BF16, F32, BF16, True),
        ("nf4", None, F32, BF16, False),  # the base would be computed in float32
        ("nf4", F16, F32, BF16, False),
        ("nf4", BF16, F16, BF16, False),
        ("nf4", BF16, BF16, F16, False),
        ("int8", None, BF16, BF16, True),
        ("int8", None, F32, BF16, False),
    ],
)
def test_dtypes_of_a_call(kind, compute, x, autocast, taken):
    """Taken where base and adapter compute in one dtype, which test_quantized_peft.py judges; otherwise the reason tells."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        reason = unsupported_input(random_layer(kind, compute_dtype=compute), torch.randn(300, 24).to(x))
    assert reason is None if taken else f"on an input in {x}" in reason


def test_few_rows_without_gradient_are_bitsandbytes_own_off_the_cpu():
    layer = random_layer("nf4")
    reason = "multiplies few rows straight from its packed weight where no gradient is recorded"
    with torch.no_grad():
        assert unsupported_input(layer, torch.empty(4, 300, 24, device="meta")) == reason
        assert unsupported_input(layer, torch.empty(6, 300, 24, device="meta")) is None
        assert unsupported_input(layer, torch.empty(4, 300, 24)) is None
    assert unsupported_input(layer, torch.empty(4, 300, 24, device="meta")) is None


def test_evaluation_leaves_the_layer_as_it_was():
    """On a CPU bitsandbytes' own forward may lay the weight out anew, after which x would get no gradient from the base."""
    layer = random_layer("nf4 double", 64, 64).eval()
    before = layer.weight.data.clone()
    with torch.no_grad():
        lora_linear(torch.randn(3, 64), weight_of(layer), *adapter(64, 64))
    assert torch.equal(layer.weight.data, before)
    assert unsupported_input(layer, torch.randn(3, 64)) is None
