"""inject: PEFT's choice of linears, everything else frozen, and a model left alone by every error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastlora import FusedLoraLinear, from_pretrained, load_adapter, merge_and_unload, save_adapter, unload
from fastlora.injection.inject import inject
from fastlora.injection.matching import match_targets

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PARTS = ["q", "qq", "k", "0", "1", "self_attn", "mlp", "proj"]
paths = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)


def llama(**options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


def tree(names: list[str]) -> nn.Module:
    """A model with a linear at each of `names`, unless it is inside another."""
    root = nn.Module()
    for name in names:
        node = root
        *parents, leaf = name.split(".")
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        if isinstance(node, nn.Linear) or hasattr(node, leaf):
            continue
        node.add_module(leaf, nn.Linear(2, 2))
    return root


def replaced(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)}


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        "ALL-LINEAR",
        ["q_proj", "v_proj"],
        ["self_attn.k_proj"],
        ["model.layers.1.mlp.up_proj"],
        r".*\.1\..*(q|k)_proj",
        ["lm_head", "down_proj"],
    ],
)
def test_replaces_what_peft_replaces(targets: str | list[str]) -> None:
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=targets))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert replaced(inject(llama(), target_modules=targets)) == expected


@given(names=st.lists(paths, min_size=1, max_size=8), targets=st.lists(paths, min_size=1, max_size=3))
def test_list_matches_as_in_peft(names: list[str], targets: list[str]) -> None:
    model = tree(names)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(target_modules=targets)
    expected = {
        name for name, _ in model.named_modules() if name and peft.tuners.tuners_utils.check_target_module_exists(config, name)
    }
    if expected and expected <= linears:
        assert set(match_targets(model, targets)) == expected
    else:
        with pytest.raises((ValueError, TypeError)):
            match_targets(model, targets)


def test_freezes_all_but_the_adapters_and_starts_as_the_base() -> None:
    model = llama(attention_bias=True)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=ids).logits
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert inject(model, target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, use_rslora=True) is model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{x}" for i in range(2) for p in "qv" for x in "AB"
    }  # fmt: skip
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert (layer.r, layer.scaling) == (4, 4.0)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_adapter_dtype_and_mode_reach_the_layers() -> None:
    model = llama().to(torch.bfloat16).eval()
    inject(model, target_modules=["o_proj"], lora_dropout=0.25, adapter_dtype=torch.float32)
    layer = model.get_submodule("model.layers.1.self_attn.o_proj")
    assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    assert layer.lora_dropout == 0.25
    assert not layer.training


def test_a_shared_linear_stays_shared() -> None:
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(3, 3)})
    inject(model, target_modules=["a", "b"], r=1)
    assert isinstance(model["a"], FusedLoraLinear)
    assert model["a"] is model["b"]
    assert type(model["c"]) is nn.Linear


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.attention(x, x, x)[0])


def test_all_linear_leaves_the_projection_that_attention_reads_without_calling_it() -> None:
    model = WithAttention()
    with pytest.warns(UserWarning, match=r"leaves out 'attention\.out_proj'.*reads its weight without calling it"):
        inject(model, target_modules="all-linear", r=2)
    assert replaced(model) == {"linear"}
    model(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(TypeError, match=r"'attention\.out_proj' is a NonDynamicallyQuantizableLinear"):
        inject(WithAttention(), target_modules=["out_proj"])
    with pytest.raises(ValueError, match="matches no module"), pytest.warns(UserWarning, match="leaves out"):
        inject(nn.ModuleList([nn.MultiheadAttention(4, 2)]), target_modules="all-linear")


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["qproj"]}, ValueError, "matches no module.*near names: q_proj"),
        ({"target_modules": "q_proj"}, ValueError, "matches no module.*near names: q_proj"),
        ({"target_modules": ["zzz"]}, ValueError, "its linears are called q_proj, k_proj, .*lm_head"),
        ({"target_modules": []}, ValueError, "matches no module"),
        ({"target_modules": "(q"}, ValueError, "not a regular expression"),
        ({"target_modules": ["mlp"]}, TypeError, "'model.layers.0.mlp' is a LlamaMLP, expected nn.Linear"),
        ({"target_modules": ["sub"]}, TypeError, "'sub' is a Subclass"),
        ({"target_modules": "all-linear"}, TypeError, "'sub' is a Subclass"),
        ({"target_modules": "all-linear", "r": 0}, ValueError, "r must be >= 1, got 0"),
        ({"target_modules": ["q_proj"], "r": 2.0}, TypeError, "r must be an int"),
        ({"target_modules": ["q_proj"], "lora_dropout": 1.5}, ValueError, "lora_dropout must be in"),
        ({"target_modules": ["q_proj"], "lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
    ],
)
def test_errors_leave_the_model_alone(options: dict[str, object], error: type[Exception], message: str) -> None:
    model = llama()
    model.add_module("sub", Subclass(2, 2))
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        inject(model, **options)
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_with_layers_of_peft_are_refused() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"holds layers of PEFT's, such as '.*q_proj': fastlora\.accelerate"):
        inject(model, target_modules="all-linear")
    assert model.get_nb_trainable_parameters()[0] > 0


def test_offloaded_linears_are_refused() -> None:
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    model = big_modeling.cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(ValueError, match="hooks or a forward of its own"):
        inject(model, target_modules=["q_proj"])


@pytest.mark.parametrize("function", [save_adapter, load_adapter, from_pretrained, unload, merge_and_unload, inject])
def test_what_is_no_model_is_refused(function: Callable[..., Any], tmp_path: Path) -> None:
    if function is from_pretrained:
        save_adapter(inject(llama(), target_modules=["q_proj"]), tmp_path)
    arguments = {inject: {"target_modules": "x"}, unload: {}, merge_and_unload: {}}.get(function, {"folder": tmp_path})
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        function("llama", **arguments)


def test_refuses_a_second_injection_and_models_without_linears() -> None:
    model = inject(llama(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="holds 2 LoRA linears already"):
        inject(model, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"no nn\.Linear at all"):
        inject(nn.Sequential(nn.ReLU()), target_modules="all-linear")
