"""Dropout of accelerated layers: PEFT's in everything but the random numbers."""

import pytest
import torch
from peft_models import accelerated, equal, inputs_of, logits_of, run
from torch import Tensor

import fastlora
from fastlora.peft import layers


def test_every_projection_and_call_draws_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def record(seed: Tensor) -> Tensor:
        seeds.append(int(seed))
        return seed

    monkeypatch.setattr("fastlora.functional.draw_seed", lambda device, draw=fastlora.dropout.draw_seed: record(draw(device)))
    model = accelerated(lora_dropout=0.25)
    logits_of(model)
    assert len(set(seeds)) == len(seeds) == len(layers.find(model)) == 14
    logits_of(model)
    assert len(set(seeds)) == 28
    logits_of(model.eval())
    assert len(seeds) == 28


def test_obeys_manual_seed() -> None:
    model = accelerated(lora_dropout=0.25)
    torch.manual_seed(3)
    first, second = logits_of(model), logits_of(model)
    torch.manual_seed(3)
    assert torch.equal(logits_of(model), first)
    assert not torch.equal(first, second)


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


def test_no_random_number_is_drawn_without_dropout() -> None:
    for model in (accelerated(), accelerated(lora_dropout=0.25).eval()):
        state = torch.get_rng_state()
        logits_of(model)
        assert torch.equal(torch.get_rng_state(), state)
