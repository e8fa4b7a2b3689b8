"""Dropout of accelerated layers: PEFT's in everything but the random numbers.

test_parity.py judges it with a mask that each layer draws anew.
"""

import pytest
import torch
from peft_models import accelerated, equal, inputs_of, logits_of, run

from fastlora.peft import layers


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_redraws_the_same_mask(use_reentrant: bool) -> None:
    model = accelerated(lora_dropout=0.25)
    run(model, inputs_of())  # it learns which layers share x
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
