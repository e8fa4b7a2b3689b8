"""PEFT's own features on accelerated models: what was PEFT's code stays PEFT's code, and the fused path follows its state.

Every test runs the same steps on a model as PEFT made it and on an accelerated copy.  Outputs are equal bit for bit where the
call is PEFT's, and within the oracle's floor of float32 where it is fused.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import build, counted_calls, inputs_of, logits_of, randomise, run, wrap
from torch import Tensor, nn

import fastlora
from fastlora import oracle
from fastlora.peft import calls, fallbacks, layers

FLOOR = oracle.FLOOR[torch.float32, torch.float32]  # 2 * FLOOR: two results that are each within it of the truth
ATTENTION = ["q_proj", "v_proj"]


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model as PEFT made it, and an accelerated copy; in evaluation mode."""
    eager = wrap(build(), **{"target_modules": ATTENTION, **options}).eval()
    fused = copy.deepcopy(eager)
    fastlora.accelerate(fused)
    return eager, fused


@torch.no_grad()
def both(
    eager: nn.Module, fused: nn.Module, steps: Callable[[nn.Module], Any] = lambda model: None, **options: Any
) -> list[Tensor]:
    """The logits of both models after `steps`."""
    for model in (eager, fused):
        steps(model)
    return [logits_of(model, **options) for model in (eager, fused)]


def assert_fused(
    eager: nn.Module, fused: nn.Module, steps: Callable[[nn.Module], Any] = lambda model: None, layers_run: int = 4
) -> Tensor:
    with counted_calls() as made:
        expected, result = both(eager, fused, steps)
    assert len(made) == layers_run
    assert oracle.relative_error(result, expected) <= FLOOR
    return result


def assert_same(
    eager: nn.Module,
    fused: nn.Module,
    reason: str | None,
    steps: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> Tensor:
    with counted_calls() as made:
        expected, result = both(eager, fused, steps, **options)
    assert not made
    assert torch.equal(result, expected)
    assert set(fallbacks(fused)) >= ({reason} if reason else set())
    return result


def parameters_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


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


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}], ids=str
)
def test_saving_and_loading(tmp_path: Path, options: dict[str, Any]) -> None:
    eager, fused = pair(**options)
    for model, name in ((eager, "eager"), (fused, "fused")):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "fused", low_cpu_mem_usage="bias" not in options).eval()
    assert len(fastlora.accelerate(loaded).taken) == 4
    assert_fused(eager, loaded)
    if "bias" not in options:  # PEFT allows one adapter with biases
        loaded.load_adapter(tmp_path / "eager", "again")
        assert_fused(eager, loaded, lambda model: model.set_adapter("again" if model is loaded else "default"))


def test_auto_model_of_a_saved_base(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = type(build()).from_pretrained(tmp_path / "base")
    eager = wrap(base, target_modules=ATTENTION).eval()
    eager.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    fastlora.accelerate(loaded)
    assert_fused(eager, loaded)


def test_adapters_on_the_meta_device_wait_until_they_are_loaded() -> None:
    eager = wrap(build(), target_modules=ATTENTION).eval()
    config = peft.LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=6)
    half = peft.get_peft_model(build(), config, low_cpu_mem_usage=True).eval()
    report = fastlora.accelerate(half)
    assert not report.taken
    assert {reason for _, reason in report.waiting} == {"its base weight is on cpu, the adapter on meta and meta"}
    peft.set_peft_model_state_dict(half, peft.get_peft_model_state_dict(eager), low_cpu_mem_usage=True)
    assert len(fastlora.peft.status(half).taken) == 4
    assert_fused(eager, half)


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


def test_hotswap_with_scalings_in_tensors(tmp_path: Path) -> None:
    """prepare_model_for_compiled_hotswap turns scalings into tensors and pads ranks; a later swap refills both."""
    other = wrap(build(), target_modules=ATTENTION, r=2, lora_alpha=8).eval()
    randomise(other, seed=9)
    other.save_pretrained(tmp_path)
    eager, fused = pair()
    before = assert_fused(eager, fused, lambda model: prepare_model_for_compiled_hotswap(model, target_rank=6))
    layer = next(iter(layers.find(fused).values()))
    assert isinstance(layer.scaling["default"], Tensor)
    after = assert_fused(eager, fused, lambda model: hotswap_adapter(model, str(tmp_path), "default"))
    assert oracle.relative_error(after, before) > 100 * FLOOR
    assert oracle.relative_error(after, logits_of(other)) <= FLOOR
    for model in (eager, fused):
        layers_of = layers.find(model).values()  # PEFT 0.18 freezes what it pads
        [half.requires_grad_() for layer in layers_of for half in (layer.lora_A, layer.lora_B)]
    results = [run(model, inputs_of()) for model in (eager, fused)]
    assert all(oracle.relative_error(tensor, results[0][name]) <= 2 * FLOOR for name, tensor in results[1].items())


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
