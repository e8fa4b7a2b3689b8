"""Adapter files of accelerated models: PEFT writes and reads them, and calls are fused in whatever order they are loaded."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import ATTENTION, FLOOR, assert_close, assert_fused, build, inputs_of, logits_of, pair, randomise, run, wrap
from torch import Tensor

import fastlora
from fastlora import oracle
from fastlora.peft import layers


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}], ids=str
)
def test_saving_and_loading(tmp_path: Path, options: dict[str, Any]) -> None:
    eager, fused = pair(**options)
    for model, name in ((eager, "eager"), (fused, "fused")):
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("eager", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads(file.with_name("adapter_config.json").read_text()) for file in files]
    for config in configs:
        config["target_modules"].sort()  # a set in PEFT
    assert configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "fused", low_cpu_mem_usage="bias" not in options).eval()
    assert len(fastlora.accelerate(loaded).taken) == 4
    assert_fused(eager, loaded)
    if "bias" not in options:  # PEFT allows one adapter with biases
        loaded.load_adapter(tmp_path / "eager", "again")
        assert_fused(eager, loaded, lambda model: model.set_adapter("again" if model is loaded else "default"))


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
    assert_close(run(fused, inputs_of()), run(eager, inputs_of()))
