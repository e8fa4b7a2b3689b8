"""A layer that changes after `accelerate` runs PEFT's forward, bit for bit. Such calls are counted, and warned about once."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_layer import fallbacks_of, forward_of_its_own, hook, layer_of, pefts, set_dtypes, x_of
from peft_models import MaskedDropout, accelerated, counted_calls, logits_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastlora
from fastlora.peft import calls, fallbacks

silent = pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")


def inside(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda layer: change(layer.get_submodule(name))


def add_bias(B: nn.Module) -> None:
    B.bias = nn.Parameter(torch.ones(12))


BASE_ALTERED = "its base layer has hooks, or a forward of its own"
ADAPTER_ALTERED = "the adapter's modules have hooks, or a forward of their own"
DTYPES = "x is torch.float32, the base weight torch.float32, the adapter torch.{} (autocast: None)"
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward of the base": (inside("base_layer", forward_of_its_own), BASE_ALTERED),
    "forward of B": (inside("lora_B.default", forward_of_its_own), ADAPTER_ALTERED),
    "normed A": (
        inside("lora_A.default", weight_norm),
        "lora_A and lora_B are ParametrizedLinear and Linear instead of plain linears",
    ),
    "normed base": (inside("base_layer", weight_norm), "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear"),
    "dropout": (inside("lora_dropout", lambda d: d.update({"default": MaskedDropout(0.5)})), "its dropout is a MaskedDropout"),
    "bias of B": (inside("lora_B.default", add_bias), "the adapter has a bias (lora_bias)"),
    "trainable base": (inside("base_layer", lambda base: base.weight.requires_grad_()), "its base weight is trainable"),
    "16-bit adapter": (set_dtypes(torch.bfloat16, torch.bfloat16), DTYPES.format("bfloat16")),
    "64-bit adapter": (set_dtypes(torch.float64, torch.float64), DTYPES.format("float64")),
    "no casting": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), calls.UNCAST),
}


@silent
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_afterwards_is_pefts(change: str) -> None:
    layer = layer_of()
    alter, reason = CHANGES[change]
    alter(layer)
    expected = pefts(layer)
    with counted_calls() as made:
        torch.manual_seed(7)
        result = layer(x_of())
    torch.manual_seed(7)
    assert torch.equal(result, expected(x_of()))
    assert not made
    assert fallbacks_of(layer) == {reason: 1}


@silent
@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_every_kind_run(kind: str, part: str) -> None:
    layer = layer_of()
    ran: list[str] = []
    handle = getattr(layer.get_submodule(part), f"register_{kind}")(lambda *args: ran.append(kind))
    with counted_calls() as made:
        layer(x_of()).sum().backward()
        assert ran == [kind]
        assert not made
        assert fallbacks_of(layer) == {BASE_ALTERED if part == "base_layer" else ADAPTER_ALTERED: 1}
        handle.remove()
        layer(x_of())
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:fastlora")
@pytest.mark.parametrize("own_forward", [False, True])
def test_hooks_of_accelerate_that_only_move_x_are_harmless(own_forward: bool) -> None:
    """A device_map puts them on every module of a model."""
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    base = nn.Sequential(nn.Linear(8, 12))
    if own_forward:
        forward_of_its_own(base[0])
    big_modeling.dispatch_model(base, {"": "cpu"}, force_hooks=True, main_device="cpu")
    assert hasattr(base[0], "_hf_hook")
    with counted_calls() as made:
        accelerated(base, target_modules=["0"])(x_of())
    assert len(made) == (not own_forward)


def test_hooks_on_the_layer_itself_run_around_the_fused_call() -> None:
    layer = layer_of().eval()
    expected = layer(x_of())
    hook(layer)
    with counted_calls() as made:
        assert torch.equal(layer(x_of()), 2 * expected)
    assert len(made) == 1


@pytest.mark.filterwarnings("error:an accelerated LoRA layer")
def test_one_warning_for_each_reason_and_model() -> None:
    reason = "several adapters are active, one of them with DoRA"
    model = accelerated(target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3, use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits_of(model)
    said = [str(warning.message) for warning in caught if "trains through PEFT's own forward" in str(warning.message)]
    assert len(said) == 1
    assert reason in said[0]
    logits_of(model)
    logits_of(copy.deepcopy(model))
    assert {name: list(counts.values()) for name, counts in fallbacks(model).items()} == {reason: [2] * 4}
    model.add_adapter("third", peft.LoraConfig(target_modules=["up_proj"], use_dora=True))
    fastlora.accelerate(model)  # takes two new layers of the same model
    model.base_model.set_adapter(["default", "second", "third", "third"])
    logits_of(model)
    assert len(fallbacks(model)[reason]) == 6


@pytest.mark.filterwarnings("error:an accelerated LoRA layer")
def test_no_warning_for_what_was_requested_or_in_evaluation() -> None:
    model = accelerated(target_modules=["q_proj"])
    with model.disable_adapter():
        logits_of(model)
    model.merge_adapter()
    logits_of(model)
    model.unmerge_adapter()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    with torch.no_grad():
        logits_of(model)
    logits_of(model.eval())
    assert fallbacks(model).keys() == {calls.DISABLED, calls.MERGED, "its base weight is trainable"}
    with pytest.raises(UserWarning, match="its base weight is trainable"):
        logits_of(model.train())


def test_counts_restart_with_each_acceleration() -> None:
    layer = layer_of()
    model = nn.ModuleList([layer])
    layer.merge()
    layer(x_of())
    assert fallbacks(model) == {calls.MERGED: {"0": 1}}
    fastlora.decelerate(model)
    assert type(layer) is Linear
    fastlora.accelerate(model)
    assert fallbacks(model) == {}
