"""PEFT's own features on accelerated models: what was PEFT's code stays PEFT's code, and the fused path follows its state.

Every test runs the same steps on a model as PEFT made it and on an accelerated copy.  Outputs are equal bit for bit where the
call is PEFT's, and within the oracle's floor of float32 where it is fused.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from peft_models import (
    ATTENTION,
    FLOOR,
    assert_fused,
    assert_same,
    both,
    build,
    counted_calls,
    inputs_of,
    logits_of,
    pair,
    parameters_equal,
    randomise,
    run,
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
    assert parameters_equal(eager, fused)


def test_safe_merge_refuses_nan_and_leaves_the_model() -> None:
    _, fused = pair()
    layer = next(iter(layers.find(fused).values()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        fused.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unload_gives_the_plain_model(method: str) -> None:
    eager, fused = pair()
    plain = [getattr(model, method)() for model in (eager, fused)]
    assert parameters_equal(*plain)
    assert [type(m) for m in plain[0].modules()] == [type(m) for m in plain[1].modules()]


def test_disable_adapter() -> None:
    eager, fused = pair()
    base = logits_of(build().eval())
    with eager.disable_adapter(), fused.disable_adapter():
        assert torch.equal(assert_same(eager, fused, calls.DISABLED), base)
    assert oracle.relative_error(assert_fused(eager, fused), base) > 100 * FLOOR


def add_second(model: peft.PeftModel, **options: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(**{"target_modules": ATTENTION, "r": 3, "lora_alpha": 5, **options}))
    randomise(model, seed=5)


def test_add_switch_and_delete_adapters() -> None:
    eager, fused = pair()
    assert_fused(eager, fused, add_second)
    first = assert_fused(eager, fused)
    second = assert_fused(eager, fused, lambda model: model.set_adapter("second"))
    assert oracle.relative_error(second, first) > 100 * FLOOR
    assert [p.requires_grad for p in eager.parameters()] == [p.requires_grad for p in fused.parameters()]
    assert_fused(eager, fused, lambda model: model.delete_adapter("second") or model.set_adapter("default"))
    assert parameters_equal(eager, fused)


def test_an_adapter_on_other_modules_makes_new_layers_that_accelerate_takes() -> None:
    eager, fused = pair()
    both(eager, fused, lambda model: add_second(model, target_modules=["q_proj", "up_proj"]))
    report = fastlora.peft.status(fused)
    assert len(report.taken) == 4
    assert [reason for _, reason in report.left] == ["not accelerated"] * 2
    report = fastlora.accelerate(fused)
    assert len(report.waiting) == 2  # "second" is not active yet
    assert_fused(eager, fused, lambda model: model.set_adapter("second"), layers_run=4)
    assert set(fallbacks(fused)) == {calls.INACTIVE}  # v_proj has no "second"


def test_several_active_adapters_are_pefts() -> None:
    eager, fused = pair()
    both(eager, fused, add_second)
    together = assert_same(
        eager, fused, "several adapters are active", lambda model: model.base_model.set_adapter(["default", "second"])
    )
    assert oracle.relative_error(together, assert_fused(eager, fused, lambda model: model.set_adapter("second"))) > 100 * FLOOR


def test_mixed_batch() -> None:
    eager, fused = pair()
    both(eager, fused, add_second)
    assert_same(eager, fused, calls.MIXED_BATCH, adapter_names=["default", "second", "__base__"])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter("other"),
        lambda model: model.delete_adapter("other"),
        lambda model: logits_of(model, adapter_names=["other"] * 3),
    ],
    ids=["set", "delete", "mixed batch"],
)
def test_unknown_adapters_are_refused_by_peft(call: Callable[[nn.Module], Any]) -> None:
    eager, fused = pair()
    errors = []
    for model in (eager, fused):
        with pytest.raises((ValueError, KeyError), match="other") as error:
            call(model)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
    assert_fused(eager, fused)


def test_weighted_adapters() -> None:
    eager, fused = pair(r=3)
    steps = lambda model: (  # noqa: E731  # the same steps for both models
        add_second(model),
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "blend", combination_type="linear"),
        model.set_adapter("blend"),
    )
    assert_fused(eager, fused, steps)
    assert parameters_equal(eager, fused)


def test_scaling_of_the_adapters() -> None:
    eager, fused = pair()
    before = assert_fused(eager, fused)

    def scale(factor: float) -> Callable[[nn.Module], None]:
        return lambda model: [layer.scale_layer(factor) for layer in layers.find(model).values()]

    assert oracle.relative_error(assert_fused(eager, fused, scale(3.0)), before) > 100 * FLOOR
    both(eager, fused, lambda model: [layer.scaling.update(default=np.float32(0.7)) for layer in layers.find(model).values()])
    assert_fused(eager, fused)
    assert_fused(eager, fused, scale(0.0))


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [1]}], ids=str)
def test_the_same_parameters_train(options: dict[str, Any]) -> None:
    eager, fused = pair(**options)
    results = [run(model.train(), inputs_of()) for model in (eager, fused)]
    assert results[0].keys() == results[1].keys()
    assert all(oracle.relative_error(tensor, results[0][name]) <= 2 * FLOOR for name, tensor in results[1].items())
    assert fallbacks(fused) == {}


def test_a_trainable_base_weight_gets_its_gradient_from_peft() -> None:
    eager, fused = pair()
    names = [name for name, _ in eager.named_parameters() if name.endswith("q_proj.base_layer.weight")]
    for model in (eager, fused):
        for name in names:
            model.get_parameter(name).requires_grad_()
    results = [run(model, inputs_of()) for model in (eager, fused)]
    assert all(oracle.relative_error(results[1][name], results[0][name]) <= 2 * FLOOR for name in names)
    assert set(fallbacks(fused)) == {"its base weight is trainable"}


def test_dora_falls_back_until_a_plain_adapter_is_active() -> None:
    eager, fused = pair(use_dora=True)
    report = fastlora.peft.status(fused)
    reason = "the adapter is a variant (DoraLinearVariant)"
    assert (report.taken, {r for _, r in report.waiting}) == ((), {reason})
    assert_same(eager, fused, reason)
    both(eager, fused, add_second)
    assert_fused(eager, fused, lambda model: model.set_adapter("second"))


def test_adapters_with_a_bias_are_pefts() -> None:
    eager = wrap(build("qwen2"), target_modules=ATTENTION, lora_bias=True).eval()
    fused = copy.deepcopy(eager)
    fastlora.accelerate(fused)
    assert_same(eager, fused, "the adapter has a bias (lora_bias)")


def test_layer_replication() -> None:
    eager, fused = pair(layer_replication=[(0, 2), (1, 2)])
    assert len(layers.find(fused)) == 6
    assert_fused(eager, fused, layers_run=6)
    layer, replica = (fused.get_submodule(f"base_model.model.model.layers.{at}.self_attn.q_proj") for at in (1, 2))
    assert layer.base_layer.weight.data_ptr() == replica.base_layer.weight.data_ptr()


def tied_model(**options: Any) -> nn.Module:
    base = build()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return wrap(base, target_modules=["lm_head", "embed_tokens", "q_proj"], **options).eval()


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
@pytest.mark.parametrize("tied_adapters", [False, True])
def test_tied_weights(tied_adapters: bool) -> None:
    """The output head shares the embedding's weight, and where asked its adapter too; the embedding's layer is not taken."""
    eager, fused = (tied_model(ensure_weight_tying=tied_adapters) for _ in range(2))
    report = fastlora.accelerate(fused)
    assert [reason for _, reason in report.left] == ["it is a peft.tuners.lora.layer.Embedding, not peft's lora.Linear"]
    heads = [model.base_model.model.lm_head for model in (eager, fused)]
    embeddings = [model.base_model.model.model.embed_tokens for model in (eager, fused)]
    assert heads[1].base_layer.weight.data_ptr() == embeddings[1].base_layer.weight.data_ptr()
    shared = [
        head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
        for head, embedding in zip(heads, embeddings, strict=True)
    ]
    assert shared[0] == shared[1]
    assert shared[1] == tied_adapters or Version(peft.__version__) < Version("0.19")
    assert_fused(eager, fused, layers_run=3)
    results = [run(model, inputs_of()) for model in (eager, fused)]
    assert all(oracle.relative_error(tensor, results[0][name]) <= 2 * FLOOR for name, tensor in results[1].items())


def test_generation() -> None:
    eager, fused = pair()
    with counted_calls() as made:
        texts = [
            model.generate(input_ids=inputs_of()["input_ids"], max_new_tokens=5, do_sample=False) for model in (eager, fused)
        ]
    assert torch.equal(*texts)
    assert len(made) == 4 * 5
