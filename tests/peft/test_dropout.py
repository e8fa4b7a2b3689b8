"""Dropout of accelerated layers: PEFT's in everything but the random numbers."""

import pytest
import torch
from peft_models import build, inputs_of, logits_of, run, wrap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import oracle
from fastlora.peft import layers

P = 0.25
FLOOR = oracle.FLOOR[torch.float32, torch.float32]


def accelerated(p: float = P) -> nn.Module:
    model = wrap(build(), lora_dropout=p)
    fastlora.accelerate(model)
    return model


def gradients(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    return run(model, inputs_of(), seed)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_projection_and_layer_draws_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("fastlora.functional.draw_seed", lambda device, draw=fastlora.dropout.draw_seed: record(draw(device)))

    def record(seed: Tensor) -> Tensor:
        seeds.append(int(seed))
        return seed

    model = accelerated()
    logits_of(model)
    assert len(set(seeds)) == len(seeds) == len(layers.find(model)) == 14
    logits_of(model)
    assert len(set(seeds)) == 28
    model.eval()
    logits_of(model)
    assert len(seeds) == 28


def test_masks_differ_between_equal_projections_and_calls() -> None:
    """The masks themselves, read from layers that show them: no base, A = 1 for one input column at a time."""
    model = wrap(
        nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)]), target_modules=["0", "1", "2"], r=8, lora_dropout=P
    )
    fastlora.accelerate(model)
    with torch.no_grad():
        for layer in layers.find(model).values():
            layer.base_layer.weight.zero_()
            for adapter in (layer.lora_A, layer.lora_B):
                adapter["default"].weight.copy_(torch.eye(8))
    x = torch.ones(500, 8)
    outputs = [layer(x) for _ in range(2) for layer in model.base_model.model]
    kept = [output != 0 for output in outputs]
    for at, one in enumerate(kept):
        assert abs(float(one.float().mean()) - (1 - P)) < 4 * (P * (1 - P) / one.numel()) ** 0.5
        assert oracle.relative_error(outputs[at], one * 6 / 8 / (1 - P)) <= FLOOR
        for other in kept[:at]:
            agreement = float((one == other).float().mean())  # of independent masks: (1 - p)² + p²
            assert abs(agreement - ((1 - P) ** 2 + P**2)) < 4 * 0.5 / one.numel() ** 0.5


def test_obeys_manual_seed() -> None:
    model = accelerated()
    assert equal(gradients(model, 3), gradients(model, 3))
    torch.manual_seed(3)
    first, second = logits_of(model), logits_of(model)
    torch.manual_seed(3)
    assert torch.equal(logits_of(model), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_redraws_the_same_mask(use_reentrant: bool) -> None:
    model = accelerated()
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert equal(plain, gradients(model))


def test_checkpointing_without_the_generator_state_would_be_seen() -> None:
    layer = next(iter(layers.find(accelerated()).values()))
    x = torch.randn(64, 32, requires_grad=True)
    weight = layer.lora_A["default"].weight

    def grad(preserve: bool) -> Tensor:
        torch.manual_seed(0)
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=preserve)
        return torch.autograd.grad(y.sum(), weight)[0]

    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(layer(x).sum(), weight)
    assert torch.equal(grad(True), plain)
    assert not torch.equal(grad(False), plain)


def test_follows_the_training_flag_of_the_dropout_module() -> None:
    model = accelerated()
    assert not torch.equal(logits_of(model), logits_of(model))
    for layer in layers.find(model).values():
        layer.lora_dropout.eval()
    assert model.training
    assert torch.equal(logits_of(model), logits_of(model))
    model.eval()
    next(iter(layers.find(model).values())).lora_dropout.train()
    assert not torch.equal(logits_of(model), logits_of(model))


def test_no_random_number_is_drawn_without_dropout() -> None:
    for model in (accelerated(p=0.0), accelerated().eval()):
        state = torch.get_rng_state()
        logits_of(model)
        assert torch.equal(torch.get_rng_state(), state)


def test_everything_dropped_leaves_the_base() -> None:
    model = accelerated(p=1.0)
    with model.disable_adapter():
        base = logits_of(model)
    assert oracle.relative_error(logits_of(model), base) <= FLOOR
    assert oracle.relative_error(logits_of(model.eval()), base) > 100 * FLOOR
