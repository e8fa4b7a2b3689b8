"""Accelerated layers that share x: PEFT's loss curves, the report, and PEFT's features between two siblings."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from peft_layer import hook
from peft_models import (
    FLOOR,
    accelerated,
    assert_close,
    build,
    config,
    counted_calls,
    curve,
    inputs_of,
    randomise,
    run,
    wrap,
)

import fastlora
from fastlora import oracle, torch_backend
from fastlora.blocks import sharing

ATTENTION = ["q_proj", "k_proj", "v_proj"]
GROUPS = {"llama": 4, "gpt2": 0, "roberta": 2, "t5": 10}  # gpt2 has one projection for q, k and v


@pytest.mark.filterwarnings("ignore:r=4 is above min", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("kind", GROUPS)
def test_the_loss_curve_is_pefts(kind: str, grouped: list[int]) -> None:
    eager = wrap(build(kind))
    model = copy.deepcopy(eager)
    fastlora.accelerate(model)
    expected, losses = curve(eager, kind, 10), curve(model, kind, 10)
    assert losses[-1] < 0.9 * losses[0]
    assert oracle.relative_error(losses, expected) <= 2 * FLOOR
    assert len(grouped) == 9 * GROUPS[kind]
    assert fastlora.peft.fallbacks(model) == {}
    assert len(fastlora.peft.status(model).groups) == GROUPS[kind]


def test_gradients_are_those_without_groups(grouped: list[int]) -> None:
    models = [wrap(build()) for _ in range(2)]
    fastlora.accelerate(models[0])
    fastlora.accelerate(models[1], groups=False)
    for step in range(2):
        assert_close(*(run(model, inputs_of(seed=step)) for model in models))
    assert grouped == [3, 2, 3, 2]
    assert fastlora.peft.status(models[1]).groups == ()


def test_the_report_shows_groups_and_what_is_computed_alone() -> None:
    model = accelerated()
    headline = "fastlora: 14 of 14 LoRA layers accelerated"
    assert str(fastlora.peft.status(model)).splitlines()[0] == headline
    run(model, inputs_of())
    assert str(fastlora.peft.status(model)).splitlines()[0] == f"{headline}, 4 groups share x"
    layers = model.base_model.model.model.layers
    hook(layers[0].self_attn.k_proj)
    hook(layers[1].mlp.up_proj)
    status = fastlora.peft.status(model)
    assert [len(names) for names in status.groups] == [2, 2, 3]
    assert [name.rpartition(".")[2] for name, _ in status.single] == ["k_proj", "up_proj"]
    assert f"  computed alone, {sharing.ALTERED}: 2 (" in str(status)
    assert not fastlora.accelerate(model).groups  # it learns again
    assert not vars(layers[0].self_attn.q_proj)["_fastlora_group"].members


def test_options_of_accelerate() -> None:
    model = wrap(build(), target_modules=["q_proj", "v_proj"])
    with pytest.raises(TypeError, match="groups must be a bool, got int 1"):
        fastlora.accelerate(model, groups=1)
    assert not fastlora.peft.status(model).taken
    fastlora.accelerate(model)
    run(model, inputs_of())
    assert str(fastlora.accelerate(model)).splitlines()[1] == "  already accelerated: 4"
    run(model, inputs_of())
    assert len(fastlora.peft.status(model).groups) == 2
    fastlora.accelerate(model, groups=False)
    run(model, inputs_of())
    assert fastlora.peft.status(model).groups == ()


def test_generation_and_evaluation_compute_each_layer_alone(grouped: list[int]) -> None:
    eager = wrap(build())
    model = copy.deepcopy(eager)
    fastlora.accelerate(model)
    run(model, inputs_of())
    ids = inputs_of()["input_ids"]
    texts = [each.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False) for each in (eager, model)]
    assert torch.equal(*texts)
    assert grouped == []


def test_small_calls_are_left_to_peft(grouped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated()
    run(model, inputs_of())
    monkeypatch.setattr(torch_backend, "BREAK_EVEN", 1 << 20)
    run(model, inputs_of())
    assert grouped == []
    monkeypatch.undo()
    with counted_calls() as made:
        run(model, inputs_of())
    assert len(made) == 14
    assert len(fastlora.peft.status(model).groups) == 4  # the small call has ended no group


def second(model: Any) -> None:
    model.add_adapter("second", config(target_modules=ATTENTION, lora_alpha=5))
    randomise(model, seed=5)
    model.set_adapter("default")


#: What happens to the model after its first sibling was called.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "switched": lambda model: model.set_adapter("second"),
    "both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: [layer.scale_layer(3.0) for layer in fastlora.peft._load("layers").find(model).values()],
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_feature_of_peft_between_two_siblings(change: str, grouped: list[int]) -> None:
    eager = wrap(build(), target_modules=ATTENTION)
    second(eager)
    model = copy.deepcopy(eager)
    fastlora.accelerate(model)
    run(model, inputs_of())
    results = []
    for each in (eager, model):
        attention, x = each.base_model.model.model.layers[0].self_attn, torch.ones(5, 32)
        y = attention.q_proj(x)
        CHANGES[change](each)
        results.append({"q": y, "k": attention.k_proj(x), "v": attention.v_proj(x)})
    assert_close(*reversed(results))
    assert grouped == [3]


def test_a_hotswapped_adapter_is_computed_from_the_next_call_on(tmp_path: Path, grouped: list[int]) -> None:
    """PEFT writes through .data, which no version counts: a swap within a forward, by another thread, would not be seen."""
    other = wrap(build(), target_modules=ATTENTION)
    randomise(other, seed=8)
    other.save_pretrained(tmp_path)
    eager = wrap(build(), target_modules=ATTENTION)
    model = copy.deepcopy(eager)
    fastlora.accelerate(model)
    for swapped in (False, True):
        if swapped:
            for each in (eager, model):
                hotswap_adapter(each, str(tmp_path), "default")
        run(model, inputs_of())
        assert_close(run(model, inputs_of()), run(eager, inputs_of()))
    assert grouped == [3] * 6
