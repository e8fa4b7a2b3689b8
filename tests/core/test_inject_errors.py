"""inject: what is refused, with the model unchanged, and what earns a warning."""

import copy
import warnings
from typing import Any

import pytest
import torch
from adapted import gpt2, llama, tied_llama
from torch import nn

from fastlora import FusedLoraLinear, inject


def with_integers() -> nn.Module:
    model = llama()
    model.add_module("packed", nn.Module())
    model.packed.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    return model


Q = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (Q | {"exclude_modules": ".*"}, ValueError, r"matches 2 modules, and exclude_modules='\.\*' excludes all of them"),
        (Q | {"modules_to_save": ["model"]}, ValueError, r"matches 2 .*and modules_to_save=\('model',\) excludes all"),
        (Q | {"exclude_modules": "(q"}, ValueError, "exclude_modules='.q' is not a regular expression"),
        (Q | {"modules_to_save": ["lm_haed"]}, ValueError, "the model has no 'lm_haed'; near names: lm_head"),
        (Q | {"modules_to_save": "lm_head"}, TypeError, "modules_to_save must be a list of names, got 'lm_head'"),
        (Q | {"modules_to_save": [3]}, TypeError, "modules_to_save must be a string or a list of strings"),
        ({"target_modules": None}, TypeError, "target_modules must be a string or a list of strings, got None"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a string or a list of strings, got \[1\]"),
        (Q | {"exclude_modules": 3}, TypeError, "exclude_modules must be a string or a list of strings, got 3"),
        (Q | {"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict .*got .'q_proj'"),
        (Q | {"layer": nn.Linear}, TypeError, "layer must be FusedLoraLinear or a subclass of it"),
        (Q | {"modules_to_save": ["ayers"]}, TypeError, "'model.layers' is a ModuleList"),
        (Q | {"modules_to_save": ["_attn"]}, ValueError, r"trained whole, but target_modules matches '.*q_proj' of it"),
        (Q | {"modules_to_save": ["packed"]}, TypeError, r"packed\.weight is torch\.int8, which cannot be trained"),
        (Q | {"modules_to_save": ["norm("]}, ValueError, r"modules_to_save: 'norm\(' is not a regular expression"),
        (Q | {"layers_to_transform": 0, "layers_pattern": "("}, ValueError, r"layers_pattern: '\(' is not a regular"),
        (Q | {"bias": "some"}, ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        (Q | {"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be >= 1, got 0"),
        (Q | {"rank_pattern": {"q_proj": 1.5}}, TypeError, r"rank_pattern\['q_proj'\] must be an int"),
        (Q | {"rank_pattern": {"(q": 2}}, ValueError, "'.q' is not a regular expression"),
        (Q | {"alpha_pattern": {"q_proj": float("inf")}}, ValueError, r"alpha_pattern\['q_proj'\] must be finite"),
        (Q | {"layers_to_transform": 7}, ValueError, "with layers_to_transform=7 matches no module"),
        (Q | {"layers_pattern": "layers"}, ValueError, "layers_pattern='layers' needs layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, ValueError, "need target_modules as a list, got a string"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "is a Embedding, expected nn.Linear or transformers' Conv1D"),
    ],
)
def test_errors_leave_the_model_alone(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = with_integers()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    grads = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with pytest.raises(error, match=message):
        inject(model, **options)
    assert dict(model.named_modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert not hasattr(model, "lora_options")


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (llama, {"exclude_modules": ["k_prjo"]}, r"excludes no module of the model; near names: k_proj"),
        (llama, {"rank_pattern": {"nothing": 2, "q_proj": 3}}, "rank_pattern: 'nothing' matches no targeted module"),
        (llama, {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern: 'v_proj' matches no targeted module"),
        (llama, {"fan_in_fan_out": True}, "fan_in_fan_out is True, but a target is a Linear: taken as False"),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": False}, "is False, but a target is a Conv1D: taken as True"),
    ],
)
def test_what_has_no_effect_earns_one_warning_at_the_caller(build: Any, options: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.warns(UserWarning, match=message) as caught:
        inject(model, **(Q | options), r=2)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(m.fan_in_fan_out == (build is gpt2) for m in model.modules() if isinstance(m, FusedLoraLinear))


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"exclude_modules": ["1.self_attn.q_proj"], "rank_pattern": {"q_proj": 1}, "modules_to_save": ["lm_head"]}
        models = [
            inject(llama(), **(Q | options), r=2),
            inject(gpt2(), target_modules=["c_attn"], r=2, fan_in_fan_out=True),
            inject(gpt2(), target_modules="all-linear", r=2),
        ]
    assert all(any(isinstance(module, FusedLoraLinear) for module in model.modules()) for model in models)


def test_a_tied_module_to_save_gets_parameters_of_its_own() -> None:
    model = tied_llama()
    tied = model.lm_head.weight
    with pytest.warns(
        UserWarning, match=r"'model.embed_tokens.weight' is tied to 'lm_head.weight'.*a copy of its own"
    ) as caught:
        inject(model, **Q, r=2, modules_to_save=["embed_tokens"])
    assert [warning.filename for warning in caught] == [__file__]
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is tied
    assert embedding is not tied
    assert embedding.data_ptr() != tied.data_ptr()
    assert torch.equal(embedding, tied)
    assert (embedding.requires_grad, tied.requires_grad) == (True, False)


def test_of_two_tied_modules_to_save_each_has_its_own_parameter() -> None:
    model = tied_llama()
    tied = model.lm_head.weight
    with pytest.warns(UserWarning, match="is tied to") as caught:
        inject(model, **Q, r=2, modules_to_save=["embed_tokens", "lm_head"])
    assert len(caught) == 1
    assert model.lm_head.weight is tied
    assert model.model.embed_tokens.weight is not tied
    assert model.model.embed_tokens.weight.requires_grad
    assert tied.requires_grad


def test_a_tied_target_stays_tied_and_says_what_merging_will_do() -> None:
    model = tied_llama()
    tied = model.lm_head.weight
    with pytest.warns(UserWarning, match="the weight of 'lm_head' is tied to 'model.embed_tokens.weight'") as caught:
        inject(model, target_modules=["lm_head"], r=2)
    assert [warning.filename for warning in caught] == [__file__]
    assert isinstance(model.lm_head, FusedLoraLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied


def test_tied_parameters_inside_one_module_to_save_stay_tied() -> None:
    part = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    part.b.weight = part.a.weight
    whole = nn.Sequential()
    whole.add_module("part", nn.Sequential(part.a, part.b))
    whole.add_module("other", nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(whole, target_modules=["other"], r=1, modules_to_save=["part"])
    assert part.a.weight is part.b.weight
    assert part.a.weight.requires_grad


def test_parameters_keep_their_identity_and_options_are_kept() -> None:
    model = llama(attention_bias=True)
    before = dict(model.named_parameters())
    inject(model, **Q, r=2, bias="lora_only", modules_to_save=["lm_head"])
    after = dict(model.named_parameters())
    assert before.keys() <= after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.lora_options.modules_to_save == ("lm_head",)
    assert copy.deepcopy(model).lora_options == model.lora_options


def test_what_is_trainable_gets_its_gradient_and_nothing_else() -> None:
    model = llama(attention_bias=True)
    inject(model, target_modules=["q_proj", "o_proj"], r=2, bias="all", modules_to_save=["lm_head", "norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    model(input_ids=torch.arange(12).view(2, 6)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
