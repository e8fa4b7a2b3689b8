"""PEFT's features on accelerated models: PEFT's code stays in charge, and the fused path follows the state of the adapters.

Each test runs the same steps on a model as PEFT made it and on an accelerated copy. Outputs are equal bit for bit if the call
runs PEFT's forward, and within the oracle's floor of float32 if it is fused.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_models import (
    ATTENTION,
    FLOOR,
    assert_close,
    assert_fused,
    assert_same,
    both,
    build,
    config,
    counted_calls,
    inputs_of,
    logits_of,
    pair,
    randomise,
    run,
    states_equal,
    wrap,
)
from torch import nn

import fastlora
from fastlora import oracle
from fastlora.peft import calls, fallbacks, layers


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge: bool) -> None:
    eager, fused = pair()
    before = assert_fused(eager, fused)
    merged = assert_same(eager, fused, calls.MERGED, lambda model: model.merge_adapter(safe_merge=safe_merge))
    assert oracle.relative_error(merged, before) <= 2 * FLOOR
    assert_fused(eager, fused, lambda model: model.unmerge_adapter())
    assert states_equal(eager, fused)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unload_gives_the_plain_model(method: str) -> None:
    eager, fused = (getattr(model, method)() for model in pair())
    assert states_equal(eager, fused)
    assert [type(m) for m in eager.modules()] == [type(m) for m in fused.modules()]


def test_disable_adapter() -> None:
    eager, fused = pair()
    base = logits_of(build().eval())
    with eager.disable_adapter(), fused.disable_adapter():
        assert torch.equal(assert_same(eager, fused, calls.DISABLED), base)
    assert oracle.relative_error(assert_fused(eager, fused), base) > 100 * FLOOR


def add_second(model: peft.PeftModel, **options: Any) -> None:
    model.add_adapter("second", config(**{"target_modules": ATTENTION, "lora_alpha": 5, **options}))
    randomise(model, seed=5)


def test_add_switch_blend_and_delete_adapters() -> None:
    eager, fused = pair()
    assert_fused(eager, fused, add_second)
    first = assert_fused(eager, fused)
    second = assert_fused(eager, fused, lambda model: model.set_adapter("second"))
    assert oracle.relative_error(second, first) > 100 * FLOOR
    assert [p.requires_grad for p in eager.parameters()] == [p.requires_grad for p in fused.parameters()]
    both(eager, fused, lambda m: m.add_weighted_adapter(["default", "second"], [0.7, 0.3], "blend", combination_type="linear"))
    blend = assert_fused(eager, fused, lambda model: model.set_adapter("blend"))
    assert oracle.relative_error(blend, second) > 100 * FLOOR
    assert_fused(eager, fused, lambda model: model.delete_adapter("second") or model.set_adapter("default"))
    assert states_equal(eager, fused)


def test_an_adapter_on_other_modules_makes_new_layers_that_accelerate_takes() -> None:
    eager, fused = pair()
    both(eager, fused, lambda model: add_second(model, target_modules=["q_proj", "up_proj"]))
    report = fastlora.peft.status(fused)
    assert len(report.taken) == 4
    assert [reason for _, reason in report.left] == ["not accelerated"] * 2
    assert len(fastlora.accelerate(fused).waiting) == 2  # "second" is not active yet
    assert_fused(eager, fused, lambda model: model.set_adapter("second"), layers_run=4)
    assert set(fallbacks(fused)) == {calls.INACTIVE}  # v_proj has no "second"


def test_scaling_of_the_adapters() -> None:
    eager, fused = pair()
    before = assert_fused(eager, fused)

    def each(change: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
        return lambda model: [change(layer) for layer in layers.find(model).values()]

    assert oracle.relative_error(assert_fused(eager, fused, each(lambda layer: layer.scale_layer(3.0))), before) > 100 * FLOOR
    assert_fused(eager, fused, each(lambda layer: layer.scaling.update(default=np.float32(0.7))))
    assert_fused(eager, fused, each(lambda layer: layer.scale_layer(0.0)))


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [1]}], ids=str)
def test_the_same_parameters_train(options: dict[str, Any]) -> None:
    eager, fused = pair(**options)
    assert_close(run(fused.train(), inputs_of()), run(eager.train(), inputs_of()))
    assert fallbacks(fused) == {}


def test_layer_replication() -> None:
    eager, fused = pair(layer_replication=[(0, 2), (1, 2)])
    assert_fused(eager, fused, layers_run=6)
    layer, replica = (fused.get_submodule(f"base_model.model.model.layers.{at}.self_attn.q_proj") for at in (1, 2))
    assert layer.base_layer.weight.data_ptr() == replica.base_layer.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings", "ignore:fastlora. ")
@pytest.mark.parametrize("tied_adapters", [False, True])
def test_tied_weights(tied_adapters: bool) -> None:
    """The output head shares the embedding's weight and, on request, its adapter. Both layers are taken."""
    base = build()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    eager, fused = (
        wrap(model, target_modules=["lm_head", "embed_tokens", "q_proj"], ensure_weight_tying=tied_adapters).eval()
        for model in (base, copy.deepcopy(base))
    )
    assert not fastlora.accelerate(fused).left
    for model in (eager, fused):
        head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
        assert head.base_layer.weight.data_ptr() == embedding.base_layer.weight.data_ptr()
    assert_fused(eager, fused, layers_run=3)
    assert_close(run(fused, inputs_of()), run(eager, inputs_of()))


def test_generation() -> None:
    ids = inputs_of()["input_ids"]
    with counted_calls() as made:
        texts = [model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in pair()]
    assert torch.equal(*texts)
    assert len(made) == 4 * 5
