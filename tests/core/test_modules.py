"""FusedLoraLinear: PEFT's semantics, merging bit for bit, and the habits of nn.Module."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import FusedLoraLinear, dropout_mask, oracle, reference
from fastlora.dropout import draw_seed

FLOOR = oracle.FLOOR[torch.float32, torch.float32]


def trained(**keywords) -> FusedLoraLinear:
    """A module whose B is not zero."""
    torch.manual_seed(0)
    module = FusedLoraLinear(24, 40, r=4, lora_alpha=6, **keywords)
    nn.init.normal_(module.lora_B)
    return module


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.uint8)


def assert_computes(module: FusedLoraLinear, y: torch.Tensor, x: torch.Tensor, **options) -> None:
    """y is what the module's tensors give in float64."""
    tensors = (t.detach().double() for t in (x, module.weight, module.lora_A, module.lora_B, module.bias))
    exact = reference.lora_linear(*tensors, **options)
    assert oracle.relative_error(y.detach(), exact) <= FLOOR


def test_new_module_is_the_linear_that_torch_would_make():
    made = []
    for kind in (nn.Linear, FusedLoraLinear):
        torch.manual_seed(0)
        made.append(kind(24, 40))
    (linear, module), x = made, torch.randn(5, 24)
    assert torch.equal(module.weight, linear.weight)
    assert torch.equal(module.bias, linear.bias)
    assert oracle.relative_error(module(x).detach(), linear(x).detach()) <= FLOOR
    assert not module.lora_B.any()
    assert 0.9 / math.sqrt(24) < module.lora_A.abs().max() <= 1 / math.sqrt(24)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_shares_storage_and_keeps_everything(bias, dtype):
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype).eval()
    module = FusedLoraLinear.from_linear(linear, r=4, lora_alpha=8, adapter_dtype=torch.float32)
    assert module.weight.data_ptr() == linear.weight.data_ptr()
    assert (module.bias is None) == (not bias)
    assert not bias or module.bias.data_ptr() == linear.bias.data_ptr()
    assert (module.weight.dtype, module.lora_A.dtype, module.training) == (dtype, torch.float32, False)
    assert linear.weight.requires_grad  # the wrapped linear itself is left as it was
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("rslora", "expected"), [(False, 6 / 4), (True, 6 / 2)])
def test_scaling(rslora, expected):
    module, x = trained(use_rslora=rslora), torch.randn(7, 24)
    assert module.scaling == expected
    assert_computes(module, module(x), x, scaling=expected)


def test_dropout_in_training_only():
    module, x = trained(lora_dropout=0.5), torch.randn(64, 24)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    mask = dropout_mask(draw_seed("cpu"), 64, 24, 0.5)
    assert_computes(module, y, x, scaling=1.5, dropout_p=0.5, keep_mask=mask)
    assert_computes(module, module.eval()(x), x, scaling=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merge_and_unmerge(dtype, fan_in_fan_out):
    module = trained(dtype=dtype, adapter_dtype=torch.float32, fan_in_fan_out=fan_in_fan_out)
    before = bits(module.weight)
    weight = module.weight.detach().double()
    delta = 1.5 * module.lora_B.detach().double() @ module.lora_A.detach().double()
    exact = weight + (delta.t() if fan_in_fan_out else delta)
    module.merge()
    assert module.merged
    assert oracle.relative_error(module.weight.detach(), exact) <= oracle.FLOOR[dtype, dtype]
    x = torch.randn(5, 24, dtype=dtype)
    weight = module.weight.t() if fan_in_fan_out else module.weight
    assert torch.equal(module(x), nn.functional.linear(x, weight, module.bias))
    module.unmerge()
    assert not module.merged
    assert torch.equal(bits(module.weight), before)


def test_merge_leaves_modules_that_share_the_weight_alone():
    linear = nn.Linear(24, 40)
    module = FusedLoraLinear.from_linear(linear)
    nn.init.normal_(module.lora_B)
    before = bits(linear.weight)
    module.merge()
    assert torch.equal(bits(linear.weight), before)
    assert not torch.equal(bits(module.weight), before)
    module.unmerge()
    assert module.weight.data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize("before_backward", ["merge", "unmerge"])
def test_merging_before_backward_leaves_its_gradients(before_backward):
    """backward uses the weight that forward used, whatever became of the module in between."""
    gradients = []
    for disturb in (False, True):
        module = trained()
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if before_backward == "unmerge":
            module.merge()
        y = module(x)
        if disturb:
            getattr(module, before_backward)()
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_partial_load_into_a_module_without_its_base_is_refused():
    module = trained()
    module.merge(keep_base=False)
    before = bits(module.weight)
    with pytest.raises(RuntimeError, match=r"keep_base=False: loading needs \['weight', 'lora_A', 'lora_B'\] as well"):
        module.load_state_dict({"bias": torch.ones(40)}, strict=False)
    assert torch.equal(bits(module.weight), before)
    other = trained()
    other.merge()
    other.load_state_dict({"bias": torch.ones(40)}, strict=False)
    assert torch.equal(bits(other.weight), before)
    assert torch.equal(other.bias, torch.ones(40))


def test_backend_of_a_module():
    module = trained()
    module.backend = "nonsense"
    with pytest.raises(ValueError, match="backend must be"):
        module(torch.randn(3, 24))


def test_what_cannot_be_merged_or_unmerged():
    module = trained(merge_weights=True)
    with pytest.raises(RuntimeError, match="not merged"):
        module.unmerge()
    module.merge(keep_base=False)
    module.training = False
    for back in (module.unmerge, module.train, lambda: module.to_linear(merged=False)):
        with pytest.raises(RuntimeError, match="keep_base=False"):
            back()
    assert (module.merged, module.training) == (True, False)
    with pytest.raises(RuntimeError, match="merged already"):
        module.merge()


@pytest.mark.filterwarnings("error")
def test_a_merged_module_in_training_warns():
    """Where its adapter would get a gradient, and only there."""
    module, x = trained(), torch.randn(5, 24)
    module.merge()
    with pytest.warns(UserWarning, match=r"merged LoRA layer runs in training mode.*call unmerge\(\)"):
        module.train()(x)
    with torch.no_grad():
        module(x)
    torch.compile(module, fullgraph=True, backend="eager")(x)
    module.eval()(x)
    module.train().requires_grad_(False)(x)
    module.requires_grad_(True).unmerge()
    module.weight.requires_grad_(False)
    module(x).sum().backward()
    assert module.lora_A.grad is not None


def test_merge_weights_merges_on_eval_and_unmerges_on_train():
    module = trained(merge_weights=True)
    before = bits(module.weight)
    model = nn.Sequential(module).eval()
    assert module.merged
    assert not torch.equal(bits(module.weight), before)
    model.eval()
    model.train()
    assert not module.merged
    assert torch.equal(bits(module.weight), before)


@pytest.mark.parametrize("keep_base", [None, True, False])
def test_state_dict_describes_the_same_function_merged_or_not(keep_base):
    module = trained()
    x = torch.randn(5, 24)
    expected = module(x).detach().double()
    if keep_base is not None:
        module.merge(keep_base)
    state = module.state_dict()
    assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
    for merged in (False, True):
        other = FusedLoraLinear(24, 40, r=4, lora_alpha=6)
        if merged:
            other.merge()
        other.load_state_dict(state)
        assert other.merged == merged
        assert oracle.relative_error(other(x).detach(), expected) <= FLOOR


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_apart(merged):
    module = trained(lora_dropout=0.1).eval()
    if merged:
        module.merge()
    x = torch.randn(5, 24)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.weight.data_ptr() != module.weight.data_ptr()
        assert twin.merged == merged
        if merged:
            twin.unmerge()
            assert torch.equal(twin.weight, module._base_weight)


def test_half_and_to():
    module = trained().half()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert module(torch.randn(3, 24, dtype=torch.float16)).dtype == torch.float16
    module.merge()
    module.to(torch.bfloat16)
    module.unmerge()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert trained().to("meta")(torch.empty(3, 24, device="meta")).shape == (3, 40)


def test_rank_zero_is_the_frozen_linear():
    linear = nn.Linear(24, 40)
    module = FusedLoraLinear.from_linear(linear, r=0, lora_dropout=0.5)
    x = torch.randn(3, 24)
    assert torch.equal(module(x), linear(x))
    assert list(module.state_dict()) == ["weight", "bias"]
    module.merge()
    assert torch.equal(module(x), linear(x))
    module.unmerge()


def test_fan_in_fan_out_takes_a_transposed_weight():
    base, x = Conv1D(40, 24), torch.randn(3, 24)
    nn.init.normal_(base.bias)
    module = FusedLoraLinear.from_linear(base, fan_in_fan_out=True)
    assert (module.in_features, module.out_features) == (24, 40)
    assert oracle.relative_error(module(x).detach(), base.double()(x.double()).detach()) <= FLOOR


def test_repr_names_what_was_asked_for():
    assert repr(trained(lora_dropout=0.1, use_rslora=True)) == (
        "FusedLoraLinear(in_features=24, out_features=40, bias=True, r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True)"
    )
