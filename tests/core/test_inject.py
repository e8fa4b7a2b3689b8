"""inject: what becomes a LoRA linear, what is trained, what earns a warning, and a model left alone by every error."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import IDS, gpt2, llama, roberta, tied_llama
from torch import nn

from fastlora import FusedLoraLinear, from_pretrained, inject, load_adapter, merge_and_unload, save_adapter, unload

Q: dict[str, Any] = {"target_modules": ["q_proj"], "r": 2}


class Subclass(nn.Linear):
    pass


def with_odd_parts() -> nn.Module:
    """A Llama with integers that cannot be trained and a linear that is not a plain one."""
    model = llama()
    model.add_module("packed", nn.Module())
    model.packed.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    model.add_module("sub", Subclass(2, 2))
    return model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["qproj"]}, ValueError, "matches no module.*near names: q_proj"),
        ({"target_modules": "q_proj"}, ValueError, "matches no module.*near names: q_proj"),
        ({"target_modules": ["zzz"]}, ValueError, "its linears are called q_proj, k_proj, .*lm_head"),
        ({"target_modules": []}, ValueError, "matches no module"),
        ({"target_modules": "(q"}, ValueError, "not a regular expression"),
        ({"target_modules": None}, TypeError, "target_modules must be a string or a list of strings, got None"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a string or a list of strings, got \[1\]"),
        ({"target_modules": ["mlp"]}, TypeError, "'model.layers.0.mlp' is a LlamaMLP, expected nn.Linear"),
        ({"target_modules": ["layers.1"]}, TypeError, "expected nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d"),
        ({"target_modules": ["sub"]}, TypeError, "'sub' is a Subclass"),
        ({"target_modules": "all-linear"}, TypeError, "'sub' is a Subclass"),
        ({"r": 0}, ValueError, "r must be >= 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int"),
        ({"adapter_dtype": torch.bfloat16}, TypeError, r"'model\.layers\.0\..*q_proj': lora_A and lora_B are"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must be in"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
        ({"bias": "some"}, ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"layer": nn.Linear}, TypeError, "layer must be FusedLoraLinear or a subclass of it"),
        ({"exclude_modules": ".*"}, ValueError, r"matches 2 modules, and exclude_modules='\.\*' excludes all of them"),
        ({"exclude_modules": "(q"}, ValueError, "exclude_modules='.q' is not a regular expression"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must be a string or a list of strings, got 3"),
        ({"modules_to_save": ["model"]}, ValueError, r"matches 2 .*and modules_to_save=\('model',\) excludes all"),
        ({"modules_to_save": ["lm_haed"]}, ValueError, "the model has no 'lm_haed'; near names: lm_head"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"modules_to_save": [3]}, TypeError, "modules_to_save must be a string or a list of strings"),
        ({"modules_to_save": ["ayers"]}, TypeError, "'model.layers' is a ModuleList"),
        ({"modules_to_save": ["_attn"]}, ValueError, r"trained whole, but target_modules matches '.*q_proj' of it"),
        ({"modules_to_save": ["packed"]}, TypeError, r"packed\.weight is torch\.int8, which cannot be trained"),
        ({"modules_to_save": ["norm("]}, ValueError, r"modules_to_save: 'norm\(' is not a regular expression"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict .*got .'q_proj'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be >= 1, got 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, TypeError, r"rank_pattern\['q_proj'\] must be an int"),
        ({"rank_pattern": {"(q": 2}}, ValueError, "'.q' is not a regular expression"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, ValueError, r"alpha_pattern\['q_proj'\] must be finite"),
        ({"layers_to_transform": "3"}, TypeError, "layers_to_transform must be an int, got str '3'"),
        ({"layers_to_transform": [0.5]}, TypeError, "layers_to_transform must be an int, got float 0.5"),
        ({"layers_to_transform": 7}, ValueError, "with layers_to_transform=7 matches no module"),
        ({"layers_to_transform": 0, "layers_pattern": "("}, ValueError, r"layers_pattern: '\(' is not a regular"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern='layers' needs layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, ValueError, "need target_modules as a list, got a string"),
    ],
)
def test_errors_leave_the_model_alone(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = with_odd_parts()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    grads = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with pytest.raises(error, match=message):
        inject(model, **(Q | options))
    assert dict(model.named_modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert not hasattr(model, "lora_options")


def test_models_that_cannot_be_injected() -> None:
    model = inject(llama(), **Q)
    with pytest.raises(ValueError, match="holds 2 LoRA layers already"):
        inject(model, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"no nn\.Linear at all"):
        inject(nn.Sequential(nn.ReLU()), target_modules="all-linear")
    offloaded = pytest.importorskip("accelerate.big_modeling").cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(ValueError, match="hooks or a forward of its own"):
        inject(offloaded, **Q)


@pytest.mark.parametrize("function", [save_adapter, load_adapter, from_pretrained, unload, merge_and_unload, inject])
def test_what_is_no_model_is_refused(function: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {inject: {"target_modules": "x"}, unload: {}, merge_and_unload: {}}.get(function, {"folder": tmp_path})
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        function("llama", **arguments)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            roberta,
            {"target_modules": "all-linear"},
            r"exclude_modules=\['classifier\.dense', 'classifier\.out_proj'\] leaves",
        ),
        (llama, {"exclude_modules": ["k_prjo"]}, r"excludes no module of the model; near names: k_proj"),
        (llama, {"rank_pattern": {"nothing": 2, "q_proj": 3}}, "rank_pattern: 'nothing' matches no targeted module"),
        (llama, {"alpha_pattern": {"v_proj": 2}}, "alpha_pattern: 'v_proj' matches no targeted module"),
        (llama, {"fan_in_fan_out": True}, "fan_in_fan_out is True, but a target is a Linear: taken as False"),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": False}, "is False, but a target is a Conv1D: taken as True"),
        (tied_llama, {"target_modules": ["lm_head"]}, "weight of 'lm_head' is tied to 'model.embed_tokens.weight'.*untie it"),
        (tied_llama, {"target_modules": ["embed_tokens"]}, "weight of 'model.embed_tokens' is tied to 'lm_head.weight'.*untie"),
        (
            tied_llama,
            {"modules_to_save": ["lm_head"]},
            "'lm_head.weight' is tied to 'model.embed_tokens.weight'.*a copy of its",
        ),
    ],
)
def test_what_has_no_or_another_effect_earns_one_warning_at_the_caller(build: Any, options: Any, message: str) -> None:
    model = build()
    with pytest.warns(UserWarning, match=message) as caught:
        inject(model, **(Q | options))
    assert [warning.filename for warning in caught] == [__file__]
    assert all(m.fan_in_fan_out == (build is gpt2) for m in model.modules() if isinstance(m, FusedLoraLinear))


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"exclude_modules": ["1.self_attn.q_proj"], "rank_pattern": {"q_proj": 1}, "modules_to_save": ["lm_head"]}
        inject(llama(), **(Q | options))
        inject(gpt2(), target_modules=["c_attn", "wpe"], r=2, fan_in_fan_out=True)
        inject(gpt2(), target_modules="all-linear", r=2)
        inject(roberta(), target_modules="all-linear", exclude_modules=["classifier.dense", "classifier.out_proj"], r=2)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []


def test_starts_as_the_base_with_its_parameters_and_gradients_for_what_is_trained() -> None:
    model = llama(attention_bias=True)
    before, expected = dict(model.named_parameters()), model(input_ids=IDS).logits
    options = {"target_modules": ["q_proj", "o_proj"], "r": 2, "modules_to_save": ["lm_head", "norm"], "bias": "all"}
    assert inject(model, **options) is model
    assert torch.equal(model(input_ids=IDS).logits, expected)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.lora_options.modules_to_save == ("lm_head", "norm")
    assert copy.deepcopy(model).lora_options == model.lora_options
    for name, parameter in after.items():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model(input_ids=IDS).logits.square().sum().backward()
    for name, parameter in after.items():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_activation_offload_changes_no_gradient() -> None:
    model = inject(llama(), target_modules="all-linear", r=2, lora_dropout=0.1).train()
    found = []
    # In the first step the layers learn which of them share x, and with it a seed.
    for context in (nullcontext(), nullcontext(), torch.autograd.graph.save_on_cpu()):
        model.zero_grad()
        torch.manual_seed(0)
        with context:
            loss = model(input_ids=IDS).logits.square().mean()
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(map(torch.equal, *found[1:]))


@pytest.mark.filterwarnings("ignore:.*is tied to")
def test_of_tied_modules_to_save_each_has_its_own_parameter() -> None:
    for saved in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        model = tied_llama()
        tied = model.lm_head.weight
        inject(model, **Q, modules_to_save=saved)
        copied = model.model.embed_tokens.weight
        assert model.lm_head.weight is tied
        assert copied.data_ptr() != tied.data_ptr()
        assert torch.equal(copied, tied)
        assert (copied.requires_grad, tied.requires_grad) == (True, "lm_head" in saved)
    inject(target := tied_llama(), target_modules=["lm_head"], r=2)
    assert target.lm_head.weight is target.model.embed_tokens.weight


def test_tied_parameters_inside_one_module_to_save_stay_tied() -> None:
    part = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    part[1].weight = part[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(nn.ModuleDict({"part": part, "other": nn.Linear(3, 3)}), target_modules=["other"], r=1, modules_to_save=["part"])
    assert part[0].weight is part[1].weight
    assert part[0].weight.requires_grad


def test_all_linear_leaves_the_projection_that_attention_reads_without_calling_it() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=r"'attention\.out_proj' is a NonDynamicallyQuantizableLinear"):
        inject(model, target_modules=["out_proj"])
    with pytest.warns(UserWarning, match=r"leaves out 'attention\.out_proj'.*reads its weight without calling it"):
        inject(model, target_modules="all-linear", r=2)
    assert [name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)] == ["linear"]
    with pytest.raises(ValueError, match=r"matches 1 .*MultiheadAttention excludes"), pytest.warns(UserWarning, match="leaves"):
        inject(nn.ModuleList([nn.MultiheadAttention(4, 2)]), target_modules="all-linear")
