"""FusedLoraLinear4bit: QLoRA without PEFT."""

import builtins
import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from quantized_layers import random_layer
from torch import nn

from fastlora import oracle, reference
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import quantize, weight_of
from fastlora.quantized_module import FusedLoraLinear4bit


def plain(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(70, 33, bias=bias, dtype=dtype)


def trained(kind: str = "nf4", dtype: torch.dtype = torch.float32, **options) -> FusedLoraLinear4bit:
    module = FusedLoraLinear4bit.from_linear(quantize(plain(dtype), kind), r=4, lora_alpha=6, **options)
    nn.init.normal_(module.lora_B)
    return module


def exact(module: FusedLoraLinear4bit, x: torch.Tensor) -> torch.Tensor:
    W = module.quantized_weight.dequantize(torch.float32)
    tensors = (t.detach().double() for t in (x, W, module.lora_A, module.lora_B, module.bias))
    return reference.lora_linear(*tensors, scaling=1.5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_what_is_kept(kind, dtype):
    module = trained(kind, dtype, adapter_dtype=torch.float32)
    x = torch.randn(50, 70).to(dtype).requires_grad_()
    y = module(x)
    assert oracle.relative_error(y.detach(), exact(module, x)) <= 2 * oracle.FLOOR[dtype, dtype]
    y.float().sum().backward()
    assert module.lora_A.grad.dtype == module.lora_B.grad.dtype == torch.float32
    assert module.weight.dtype == torch.uint8
    assert module.weight.numel() == 33 * 70 / 2
    assert f", {kind})" in repr(module)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_quantize_is_what_bitsandbytes_makes_of_a_layer():
    linear = plain(torch.bfloat16)
    own = Linear4bit(70, 33, quant_type="nf4")
    own.load_state_dict(linear.state_dict())
    own.weight.data = linear.weight.data
    own.to("cpu")
    made = quantize(linear.eval(), "nf4")
    assert torch.equal(made.weight.data, own.weight.data)
    assert torch.equal(weight_of(made).dequantize(torch.float32), weight_of(own).dequantize(torch.float32))
    assert made.bias is linear.bias
    assert not made.training
    x = torch.randn(3, 70, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(made(x), own(x))


def test_weight_and_bias_are_the_layers():
    linear = quantize(plain(), "nf4")
    module = FusedLoraLinear4bit.from_linear(linear.eval())
    assert module.weight is linear.weight
    assert module.bias.data_ptr() == linear.bias.data_ptr()
    assert not module.bias.requires_grad
    assert not module.training
    assert module.lora_A.dtype == torch.float32


def test_state_dict_has_bitsandbytes_keys_and_loads():
    source, target = trained("nf4"), trained("nf4")
    target.weight = quantize(nn.Linear(70, 33), "nf4").weight
    nn.init.normal_(target.lora_B)
    state = nn.Sequential(source).state_dict()
    linear = nn.Sequential(quantize(plain(), "nf4"))
    assert set(state) == set(linear.state_dict()) | {"0.lora_A", "0.lora_B"}
    nn.Sequential(target).load_state_dict(state)
    x = torch.randn(5, 70)
    assert torch.equal(source(x), target(x))


def test_broken_states_are_refused():
    module = trained()
    state = module.state_dict()
    partial = {key: tensor for key, tensor in state.items() if key == "weight" or "." not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.quant_state"):
        module.load_state_dict(partial)
    other = FusedLoraLinear4bit.from_linear(random_layer("nf4", 33, 64), r=4)
    with pytest.raises(RuntimeError, match=r"weight is \(33, 64\), expected \(33, 70\)"):
        module.load_state_dict(other.state_dict() | {"bias": torch.zeros(33), "lora_A": module.lora_A})


def test_copies_and_casts_leave_the_packed_weight_alone():
    module = trained()
    x = torch.randn(5, 70)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    packed = module.weight.data.clone()
    module.bfloat16()
    assert torch.equal(module.weight.data, packed)
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_merging():
    module = trained(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    W = module.quantized_weight.dequantize(torch.float32)
    sum_ = W.double() + 1.5 * module.lora_B.detach().double() @ module.lora_A.detach().double()
    merged = module.merged_weight()
    assert merged.dtype == torch.bfloat16
    assert oracle.relative_error(merged, sum_) <= oracle.FLOOR[torch.bfloat16, torch.bfloat16]
    with pytest.raises(RuntimeError, match="would round the adapter away"):
        module.merge()


@pytest.mark.parametrize("option", ["merge_weights", "fan_in_fan_out"])
def test_options_that_need_a_dense_weight(option):
    with pytest.raises(ValueError, match=f"{option}=True is not possible on a weight of 4 bits"):
        FusedLoraLinear4bit.from_linear(quantize(plain(), "nf4"), **{option: True})


def test_bad_input():
    with pytest.raises(ValueError, match="r=0 is not possible on a weight of 4 bits"):
        FusedLoraLinear4bit.from_linear(quantize(plain(), "nf4"), r=0)
    with pytest.raises(TypeError, match="must be a bitsandbytes Linear4bit, got Linear8bitLt"):
        FusedLoraLinear4bit.from_linear(random_layer("int8"))
    with pytest.raises(TypeError, match=r"got Linear$"):
        FusedLoraLinear4bit.from_linear(plain())
    with pytest.raises(ValueError, match=r"quantize must be one of \('nf4', 'fp4'\), got 'int4'"):
        quantize(plain(), "int4")
    with pytest.raises(TypeError, match=r"got a weight in torch\.float64"):
        quantize(plain(torch.float64), "nf4")
    with pytest.raises(TypeError, match="got a Linear4bit"):
        quantize(Linear4bit(4, 4), "nf4")
    with pytest.raises(ValueError, match="on the meta device: load the model first"):
        quantize(nn.Linear(4, 4, device="meta"), "nf4")
    with pytest.raises(TypeError, match="dequantise it first"):
        FusedLoraLinear.from_linear(quantize(plain(), "nf4"))


def test_bitsandbytes_missing(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **keywords):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'quantize=\'nf4\' needs bitsandbytes: pip install "fastlora\[quant\]"'):
        quantize(plain(), "nf4")
