"""Layers of bitsandbytes: parity with PEFT's on them, which are taken, and which of their calls."""

import re
import subprocess
import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from quantized_layers import DTYPES, KINDS, adapter, by_definition, dense, peft_layer, quantize, random_layer
from torch import nn

from fastlora import dropout_mask, lora_linear, oracle, reference
from fastlora.dropout import keep_scale
from fastlora.oracle import Case
from fastlora.quantized import is_quantized, unsupported_input, weight_of


class Masked(nn.Module):
    """PEFT's dropout with fastlora's mask."""

    def __init__(self, seed: int, p: float) -> None:
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * dropout_mask(self.seed, len(x), x.shape[1], self.p) * keep_scale(self.p)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_pefts_own_layer(kind, dropout_p, dtype, adapter_dtype, backend):
    """Ragged rows, bias, every gradient: in float64 on the dense weight, at most twice as far off as PEFT's own layer."""

    def fused(x, weight, *tensors, **options):
        return lora_linear(x, weight_of(quantize(weight.float(), kind)), *tensors, backend=backend, **options)

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
        reason = unsupported_input(layer, tensor)
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
