"""FusedLoraLinear4bit: QLoRA without PEFT."""

import copy
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from quantized_layers import random_layer
from torch import nn

from fastlora import (
    from_pretrained,
    inject,
    load_adapter,
    merge_and_unload,
    oracle,
    reference,
    save_adapter,
    unload,
)
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import quantize, weight_of
from fastlora.quantized_module import FusedLoraLinear4bit
from fastlora.reference import EagerLoraLinear


def hooked() -> nn.Module:
    linear = quantize(plain(), "nf4")
    linear.register_forward_hook(lambda *_: None)
    return linear


def plain(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(70, 33, bias=bias, dtype=dtype)


def trained(kind: str = "nf4", dtype: torch.dtype = torch.float32, **options) -> FusedLoraLinear4bit:
    module = FusedLoraLinear4bit.from_linear(quantize(plain(dtype), kind), **{"r": 4, "lora_alpha": 6, **options})
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


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        (lambda: trained(merge_weights=True), ValueError, "merge_weights=True is not possible on a weight of 4 bits"),
        (lambda: trained(fan_in_fan_out=True), ValueError, "fan_in_fan_out=True is not possible on a weight of 4 bits"),
        (lambda: trained(r=0), ValueError, "r=0 is not possible on a weight of 4 bits"),
        (lambda: FusedLoraLinear4bit.from_linear(random_layer("int8")), TypeError, "bitsandbytes Linear4bit, got Linear8bitLt"),
        (lambda: FusedLoraLinear4bit.from_linear(plain()), TypeError, r"got Linear$"),
        (lambda: FusedLoraLinear4bit.from_linear(hooked()), ValueError, "is a Linear4bit with hooks or a forward of its own"),
        (lambda: FusedLoraLinear.from_linear(quantize(plain(), "nf4")), TypeError, "dequantise it first"),
        (lambda: quantize(plain(), "int4"), ValueError, r"quantize must be one of \('nf4', 'fp4'\), got 'int4'"),
        (lambda: quantize(plain(torch.float64), "nf4"), TypeError, r"got a weight in torch\.float64"),
        (lambda: quantize(Linear4bit(4, 4), "nf4"), TypeError, "got a Linear4bit"),
        (lambda: quantize(nn.Linear(4, 4, device="meta"), "nf4"), ValueError, "on the meta device: load the model first"),
    ],
)
def test_bad_input(refused, error, message):
    with pytest.raises(error, match=message):
        refused()


def test_bitsandbytes_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ImportError, match=r"quantize=\'nf4\' needs bitsandbytes: pip install bitsandbytes"):
        quantize(plain(), "nf4")


# Injected into whole models.


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Tanh(), nn.Linear(24, 5)).to(dtype)


def injected(dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    model = inject(network(dtype), target_modules=["0", "2"], r=4, lora_alpha=6, **{"quantize": "nf4", **options})
    for module in model:
        if isinstance(module, FusedLoraLinear4bit):
            nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_inject(kind):
    model, own = injected(quantize=kind, bias="lora_only"), network()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert type(layer) is FusedLoraLinear4bit
        expected = weight_of(quantize(own.get_submodule(name), kind)).dequantize(torch.float32)
        assert torch.equal(layer.quantized_weight.dequantize(torch.float32), expected)
        assert layer.quantized_weight.scheme.kind == kind
    assert type(model[4]) is nn.Linear
    model(torch.randn(3, 24)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"0.bias", "0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}


def test_inject_into_a_quantised_model():
    """As transformers loads one: the same packed parameters."""
    model = network()
    model[0], model[2] = quantize(model[0], "nf4"), quantize(model[2], "fp4")
    packed = model[0].weight
    inject(model, target_modules="all-linear", r=4)
    assert [type(module).__name__ for module in model[::2]] == ["FusedLoraLinear4bit", "FusedLoraLinear4bit", "FusedLoraLinear"]
    assert model[0].weight is packed


def test_unload_gives_the_4_bit_linears_back():
    model, x = injected(), torch.randn(3, 24)
    before = {name: module.weight for name, module in model.named_children() if isinstance(module, FusedLoraLinear4bit)}
    y = model(x)
    unload(model)
    assert all(type(model.get_submodule(name)) is Linear4bit for name in before)
    assert all(model.get_submodule(name).weight is weight for name, weight in before.items())
    inject(model, target_modules=["0", "2"], r=4)
    assert not torch.equal(model(x), y)
    plain = network()
    plain[0], plain[2] = quantize(plain[0], "nf4"), quantize(plain[2], "nf4")
    expected = plain(x.requires_grad_()).detach()
    assert oracle.relative_error(model(x).detach(), expected) <= oracle.FLOOR[torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_gives_dense_linears(dtype):
    model = injected(dtype)
    x = torch.randn(50, 24, dtype=dtype)
    y = model(x).detach()
    merge_and_unload(model, safe_merge=True)
    assert [type(module) for module in model] == [type(module) for module in network()]
    assert model[0].weight.dtype == dtype
    assert oracle.relative_error(model(x).detach(), y.double()) <= 8 * oracle.FLOOR[dtype, dtype]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_a_4_bit_model_with_merged_layers_is_saved_as_what_it_is(targets, tmp_path):
    """transformers' config says which linears are packed: all but the head, then all but that and what was merged, or none."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    in_4_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load(tmp_path / "base", quantization_config=in_4_bits, device_map={"": "cpu"})
    merge_and_unload(inject(model, target_modules=targets, r=4)).save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert any(type(module) is Linear4bit for module in loaded.modules()) == (targets != "all-linear")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_adapter_files(tmp_path):
    model, other, x = injected(), injected(), torch.randn(3, 24)
    nn.init.normal_(other[0].lora_B)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    plain = network()
    plain[0], plain[2] = quantize(plain[0], "nf4"), quantize(plain[2], "nf4")
    assert torch.equal(from_pretrained(plain, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "int3"}, ValueError, "quantize must be None or one of 'nf4', 'fp4', got 'int3'"),
        ({"layer": EagerLoraLinear}, TypeError, "layer=EagerLoraLinear cannot hold a quantised weight"),
    ],
    ids=["kind", "layer"],
)
def test_inject_refuses(options, error, message):
    model = network()
    before = list(model)
    with pytest.raises(error, match=message):
        inject(model, target_modules=["0", "2"], **{"quantize": "nf4", **options})
    assert list(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
