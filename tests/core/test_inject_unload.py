"""merge_and_unload and unload: a plain model again, as PEFT leaves it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import gpt2, llama, logits, randomise
from torch import nn

from fastlora import FusedLoraLinear, inject, merge_and_unload, oracle, unload

peft = pytest.importorskip("peft")


def with_biases() -> nn.Module:
    return llama(attention_bias=True)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (with_biases, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]}),
    "all biases": (with_biases, {"target_modules": ["q_proj"], "bias": "all", "rank_pattern": {".*1.*": 2}}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "none"}),
}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_leaves_what_peft_leaves(case: str, merge: bool) -> None:
    build, options = CASES[case]
    wrapped = randomise(peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=8, **options)))
    expected = wrapped.merge_and_unload() if merge else wrapped.unload()
    model = randomise(inject(build(), r=4, lora_alpha=8, **options))
    merged_by_forward = logits(model)
    assert (merge_and_unload(model) if merge else unload(model)) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    theirs = dict(expected.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == theirs[name].requires_grad, name
        assert parameter.dtype == theirs[name].dtype
        assert oracle.relative_error(parameter.detach(), theirs[name].detach()) <= oracle.FLOOR[torch.float32, torch.float32]
    assert not hasattr(model, "lora_options")
    floor = oracle.FLOOR[torch.float32, torch.float32]
    if merge:
        truth = logits(model.double())
        by_forward, by_peft = (oracle.relative_error(result, truth) for result in (merged_by_forward, logits(expected)))
        assert by_forward <= max(floor, 2 * by_peft)
    with_adapters = logits(build())
    assert oracle.relative_error(merged_by_forward, with_adapters) > 1000 * floor  # the adapters matter


def test_unload_gives_back_the_very_parameters() -> None:
    model = llama()
    before = dict(model.named_parameters())
    expected = logits(model)
    unload(randomise(inject(model, target_modules="all-linear", r=2)))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(logits(model), expected)
    inject(model, target_modules=["q_proj"], r=2)  # and once more


def test_merging_keeps_the_dtype_the_mode_and_16_bit_quality() -> None:
    model = randomise(inject(llama().to(torch.bfloat16), target_modules=["q_proj"], r=4, adapter_dtype=torch.float32))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.train()
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    merged = merge_and_unload(model).get_submodule("model.layers.0.self_attn.q_proj")
    assert type(merged) is nn.Linear
    assert merged.training
    assert not model.training
    assert not model.get_submodule("model.layers.1.self_attn.q_proj").training
    assert torch.equal(merged.weight, exact.bfloat16())


@pytest.mark.filterwarnings("ignore:.*is tied to")
@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_of_tied_weights_the_adapted_one_is_untied_by_merging_and_the_other_stays(target: str, other: str) -> None:
    model = llama(tie_word_embeddings=True)
    weight = model.get_submodule(other).weight.detach().clone()
    randomise(inject(model, target_modules=[target], r=4))
    expected = logits(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merge_and_unload(model)
    assert torch.equal(model.get_submodule(other).weight, weight)
    assert model.config.tie_word_embeddings is False
    assert oracle.relative_error(logits(model), expected) <= oracle.FLOOR[torch.float32, torch.float32]
    tied = llama(tie_word_embeddings=True)
    unload(inject(tied, target_modules=[target], r=4))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.config.tie_word_embeddings is True


@pytest.mark.parametrize("keep_base", [True, False])
def test_layers_that_are_merged_already(keep_base: bool) -> None:
    name = "model.layers.1.self_attn.q_proj"
    model = randomise(inject(llama(), target_modules=["q_proj"], r=4))
    expected = logits(model)
    base = model.get_submodule(name).weight.detach().clone()
    model.get_submodule(name).merge(keep_base)
    if keep_base:
        unload(model)
        assert torch.equal(model.get_submodule(name).weight, base)
        return
    with pytest.raises(RuntimeError, match=f"'{name}' is merged.*dropped the base weight"):
        unload(model)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), FusedLoraLinear)
    merge_and_unload(model)
    assert oracle.relative_error(logits(model), expected) <= oracle.FLOOR[torch.float32, torch.float32]


def test_safe_merge_refuses_broken_adapters_and_changes_nothing() -> None:
    model = randomise(inject(llama(), target_modules=["q_proj"], r=4))
    broken = model.get_submodule("model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        broken.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj' has infinite or NaN"):
        merge_and_unload(model, safe_merge=True)
    assert not any(m.merged for m in model.modules() if isinstance(m, FusedLoraLinear))
    with torch.no_grad():
        broken.lora_A[0, 0] = 1.0
    merge_and_unload(model, safe_merge=True)
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())


def test_a_shared_layer_stays_shared_and_a_single_layer_is_returned() -> None:
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": linear, "b": linear})
    merge_and_unload(inject(model, target_modules=["a", "b"], r=1))
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"]
    layer = FusedLoraLinear(4, 5, r=2, bias=False)
    plain = unload(layer)
    assert type(plain) is nn.Linear
    assert plain.weight is layer.weight
    assert plain.bias is None


@pytest.mark.parametrize("take_away", [merge_and_unload, unload])
def test_a_plain_model_is_refused(take_away: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        take_away(llama())
