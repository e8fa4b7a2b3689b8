"""register: accelerated layers from the start, through PEFT's hook for custom modules."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import accelerated, build, config, counted_calls, equal, inputs_of, logits_of, randomise, run, wrap
from torch import nn

import fastlora
from fastlora.peft import layers, register


class Special(nn.Linear):
    """Somebody else's linear."""


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:fastlora. ")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "init_lora_weights": "gaussian"}, {"use_dora": True}], ids=str)
def test_a_registered_config_wraps_as_accelerate_does(kind: str, options: dict[str, Any]) -> None:
    lora_config = config(**options)
    assert register(lora_config) is lora_config
    registered = peft.get_peft_model(build(kind), lora_config)
    randomise(registered)
    other = accelerated(build(kind), **options)
    assert repr(registered) == repr(other)
    assert fastlora.peft.status(registered) == fastlora.peft.status(other)
    with counted_calls() as made:
        results = [run(model.eval(), inputs_of(kind)) for model in (registered, other)]
    assert len(made) == (0 if "use_dora" in options else 2 * len(layers.find(registered)))
    assert results[0].keys() == results[1].keys()
    assert equal(*results)


def test_other_layers_go_pefts_way() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"special": Special(4, 4), "embedding": nn.Embedding(4, 4), "plain": nn.Linear(4, 4)})
    model.update({"four": bnb.nn.Linear4bit(64, 64), "eight": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)})
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    plain = peft.get_peft_model(copy.deepcopy(model), config(target_modules=list(model)))
    wrapped = peft.get_peft_model(model, register(config(target_modules=list(model))))
    kinds = [{name: type(layer) for name, layer in layers.find(each).items()} for each in (plain, wrapped)]
    assert fastlora.peft.status(wrapped).taken == ("base_model.model.plain",)
    assert {name for name in kinds[0] if kinds[0][name] is not kinds[1][name]} == {"base_model.model.plain"}


def test_saving_forgets_the_registration_and_loading_is_exact(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(build(), register(config()))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path, config=register(peft.LoraConfig.from_pretrained(tmp_path)))
    assert len(fastlora.peft.status(loaded).taken) == 14
    assert not fastlora.peft.status(peft.PeftModel.from_pretrained(build(), tmp_path)).taken
    assert torch.equal(logits_of(loaded.eval()), logits_of(wrapped.eval()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c)), register])
def test_a_copy_of_the_config_is_registered_too(duplicate: Any) -> None:
    """It keeps its own options. To register twice is to register once."""
    other = duplicate(register(config(lora_dropout=0.1)))
    other.lora_dropout = 0.5
    wrapped = peft.get_peft_model(build(), other)
    assert len(fastlora.peft.status(wrapped).taken) == 14
    assert {layer.lora_dropout["default"].p for layer in layers.find(wrapped).values()} == {0.5}


def test_an_adapter_added_with_a_registered_config() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    model.add_adapter("second", register(config(target_modules=["q_proj", "v_proj"])))
    report = fastlora.peft.status(model)
    assert [name.rpartition(".")[2] for name, _ in report.waiting] == ["v_proj"] * 2  # "second" is not active yet
    assert [name.rpartition(".")[2] for name, _ in report.left] == ["q_proj"] * 2  # PEFT's, there before
    model.set_adapter("second")
    assert len(fastlora.peft.status(model).taken) == 2


def test_bad_configs_are_refused_and_unchanged() -> None:
    adalora = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    for wrong, told in (("q_proj", "str"), (peft.IA3Config(), "IA3Config of .*IA3"), (adalora, "AdaLoraConfig of .*ADALORA")):
        with pytest.raises(TypeError, match=f"lora_config must be a LoraConfig, got {told}"):
            register(wrong)
    taken = config()
    taken._register_custom_module({nn.Linear: nn.Identity})
    with pytest.raises(ValueError, match=r"Identity.* registered for Linear"):
        register(taken)
    assert taken._custom_modules == {nn.Linear: nn.Identity}
    assert adalora._custom_modules is None
