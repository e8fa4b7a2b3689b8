"""Dropout of accelerated layers: PEFT's in everything but the random numbers."""

import pytest
import torch
from peft_models import accelerated, equal, inputs_of, logits_of, run
from torch import Tensor

from fastlora.dropout import draw_seed
from fastlora.peft import layers


def test_every_projection_and_call_draws_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[Tensor] = []
    monkeypatch.setattr("fastlora.functional.draw_seed", lambda device: seeds.append(draw_seed(device)) or seeds[-1])
    model = accelerated(lora_dropout=0.25)
    logits_of(model)
    assert len(set(map(int, seeds))) == len(seeds) == len(layers.find(model)) == 14
    logits_of(model)
    assert len(set(map(int, seeds))) == 28
    logits_of(model.eval())
    assert len(seeds) == 28


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_redraws_the_same_mask(use_reentrant: bool) -> None:
    model = accelerated(lora_dropout=0.25)
    plain = run(model, inputs_of())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert equal(plain, run(model, inputs_of()))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant, "preserve_rng_state": False})
    assert not equal(plain, run(model, inputs_of())), "the test would see another mask"


def test_follows_the_training_flag_of_the_dropout_module() -> None:
    model = accelerated(lora_dropout=0.25)
    assert not torch.equal(logits_of(model), logits_of(model))
    for layer in layers.find(model).values():
        layer.lora_dropout.eval()
    assert model.training
    assert torch.equal(logits_of(model), logits_of(model))
    model.eval()
    next(iter(layers.find(model).values())).lora_dropout.train()
    assert not torch.equal(logits_of(model), logits_of(model))
