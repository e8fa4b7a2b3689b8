"""A layer changed after it was accelerated goes to PEFT's forward, bit for bit; that is counted, and said once."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_layer import forward_of_its_own, hook, layer_of, set_dtypes, x_of
from peft_models import MaskedDropout, build, counted_calls, logits_of, wrap
from torch import nn
from torch.nn.utils import parametrizations

import fastlora
from fastlora.peft import calls, fallbacks, layers


def add_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(12))


def replace_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = MaskedDropout(0.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on the base": (lambda layer: hook(layer.base_layer), "its base layer has hooks, or a forward of its own"),
    "forward of the base": (
        lambda layer: forward_of_its_own(layer.base_layer),
        "its base layer has hooks, or a forward of its own",
    ),
    "hook on A": (lambda layer: hook(layer.lora_A["default"]), "the adapter's modules have hooks, or a forward of their own"),
    "forward of B": (
        lambda layer: forward_of_its_own(layer.lora_B["default"]),
        "the adapter's modules have hooks, or a forward of their own",
    ),
    "hook on dropout": (
        lambda layer: hook(layer.lora_dropout["default"]),
        "the adapter's modules have hooks, or a forward of their own",
    ),
    "parametrised A": (
        lambda layer: parametrizations.weight_norm(layer.lora_A["default"]),
        "lora_A and lora_B are ParametrizedLinear and Linear instead of plain linears",
    ),
    "parametrised base": (
        lambda layer: parametrizations.weight_norm(layer.base_layer),
        "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "dropout of another kind": (replace_dropout, "its dropout is a MaskedDropout"),
    "bias of B": (add_bias, "the adapter has a bias (lora_bias)"),
    "trainable base": (lambda layer: layer.base_layer.weight.requires_grad_(), "its base weight is trainable"),
    "16-bit adapter": (
        set_dtypes(torch.bfloat16, torch.bfloat16),
        "x is torch.float32, the base weight torch.float32, the adapter torch.bfloat16 (autocast: None)",
    ),
    "64-bit adapter": (
        set_dtypes(torch.float64, torch.float64),
        "x is torch.float32, the base weight torch.float32, the adapter torch.float64 (autocast: None)",
    ),
    "no casting": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), calls.UNCAST),
}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_afterwards_is_pefts(change: str) -> None:
    layer = layer_of()
    alter, reason = CHANGES[change]
    alter(layer)
    expected = copy.deepcopy(layer)
    layers.restore(expected)
    with counted_calls() as made:
        torch.manual_seed(7)
        result = layer(x_of())
    torch.manual_seed(7)
    assert torch.equal(result, expected(x_of()))
    assert not made
    assert dict(layer._fastlora_tally.fallbacks) == {reason: 1}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
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
    handle.remove()
    with counted_calls() as made:
        layer(x_of())
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
def test_adapter_of_two_dtypes_fails_as_in_peft() -> None:
    layer = layer_of()
    set_dtypes(torch.float32, torch.float64)(layer)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x_of())


@pytest.mark.filterwarnings("ignore:fastlora")
@pytest.mark.parametrize("own_forward", [False, True])
def test_hooks_of_accelerate_that_only_move_x_are_harmless(own_forward: bool) -> None:
    """As a device_map puts them on every module of a model over several devices."""
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    base = nn.Sequential(nn.Linear(8, 12))
    if own_forward:
        forward_of_its_own(base[0])
    big_modeling.dispatch_model(base, {"": "cpu"}, force_hooks=True, main_device="cpu")
    assert hasattr(base[0], "_hf_hook")
    model = wrap(base, target_modules=["0"])
    fastlora.accelerate(model)
    with counted_calls() as made:
        model(x_of())
    assert len(made) == (not own_forward)


def test_hooks_on_the_layer_itself_run_around_the_fused_call() -> None:
    layer = layer_of().eval()
    expected = layer(x_of())
    hook(layer)
    with counted_calls() as made:
        assert torch.equal(layer(x_of()), 2 * expected)
    assert len(made) == 1


def test_one_warning_for_each_reason_and_model() -> None:
    model = wrap(build(), target_modules=["q_proj", "v_proj"])
    fastlora.accelerate(model)
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3))
    model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits_of(model)
        logits_of(model)
    said = [str(warning.message) for warning in caught if "trains through PEFT's own forward" in str(warning.message)]
    assert len(said) == 1
    assert "several adapters are active" in said[0]
    counted = fallbacks(model)
    assert counted.keys() == {"several adapters are active"}
    assert set(counted["several adapters are active"].values()) == {2}
    assert len(counted["several adapters are active"]) == 4
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model)
        logits_of(other)
    assert set(fallbacks(model)["several adapters are active"].values()) == {3}
    model.add_adapter("third", peft.LoraConfig(target_modules=["up_proj"]))
    fastlora.accelerate(model)  # takes two new layers, of the same model
    model.base_model.set_adapter(["default", "second", "third", "third"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model)
    assert len(fallbacks(model)["several adapters are active"]) == 6


@pytest.mark.filterwarnings("error:an accelerated LoRA layer")
def test_no_warning_for_what_was_asked_for_or_in_evaluation() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    fastlora.accelerate(model)
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


def test_counts_begin_anew_with_each_acceleration() -> None:
    layer = layer_of()
    model = nn.ModuleList([layer])
    layer.merge()
    layer(x_of())
    assert fallbacks(model) == {calls.MERGED: {"0": 1}}
    fastlora.decelerate(model)
    assert type(layer) is Linear
    fastlora.accelerate(model)
    assert fallbacks(model) == {}
