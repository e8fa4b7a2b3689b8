"""DoRA through accelerated layers: PEFT's forward and gradients, judged in float64 by the oracle's rule."""

from typing import Any
from unittest import mock

import peft
import pytest
import torch
from peft_layer import layer_of, x_of
from peft_models import PRECISIONS, Judged, accelerated, bound_of, build, inputs_of, logits_of, randomise, wrap
from quantized_layers import quantize
from saved import saved_by
from torch import nn

import fastlora
from fastlora import dora, oracle, quantized
from fastlora.peft import layers

DRAWS = {torch.float32: 2, torch.bfloat16: 6}


def judged(kind: str, precision: str, **options: Any) -> tuple[Judged, list[str]]:
    """The verdict, and the outputs that fail, over some inputs and masks."""
    dtype, autocast_dtype = PRECISIONS[precision]
    judge = Judged(with_magnitudes(wrap(build(kind, dtype), use_dora=True, **options)), autocast_dtype)
    compute = autocast_dtype or dtype
    for draw in range(DRAWS[compute]):
        judge.add(inputs_of(kind, seed=draw), seed=draw)
    return judge, judge.failures(oracle.FLOOR[compute, compute])


def with_magnitudes(model: nn.Module) -> nn.Module:
    """Trained magnitudes, 0.6 to 1.4 times the norm: at the norm itself, what they scale would not show."""
    for layer in layers.find(model).values():
        for name, module in layer.lora_magnitude_vector.items():
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            module.update_layer(base_layer=layer.base_layer, lora_A=A, lora_B=B, scaling=layer.scaling[name])
            module.weight.data = (module.weight * torch.linspace(0.6, 1.4, len(module.weight))).to(A.dtype)
    return model


CASES = [(kind, precision, p) for kind in ("llama", "gpt2") for precision in PRECISIONS for p in (0.0, 0.3)]


@pytest.mark.filterwarnings("ignore:r=4 is above min", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("kind", "precision", "dropout_p"), CASES)
def test_logits_and_every_gradient(kind: str, precision: str, dropout_p: float) -> None:
    judge, failures = judged(kind, precision, lora_dropout=dropout_p)
    assert not failures
    assert fastlora.peft.fallbacks(judge.fused) == {}
    assert sum("lora_magnitude_vector" in name for name in judge.sums) == len(layers.find(judge.fused)) > 0
