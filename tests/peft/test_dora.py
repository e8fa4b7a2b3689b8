"""DoRA through accelerated layers: PEFT's forward and gradients, judged in float64 by the oracle's rule."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft_models import PRECISIONS, Judged, accelerated, build, inputs_of, wrap
from quantized_layers import random_layer
from quantized_models import dense, quantized_llama
from saved import saved_by
from torch import nn

import fastlora
from fastlora import oracle, quantized, reference
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


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "precision"), [("nf4", "float32"), ("nf4 double", "mixed-autocast")])
def test_quantised(kind: str, precision: str, dropout_p: float) -> None:
    dtype, autocast_dtype = PRECISIONS[precision]
    model = wrap(quantized_llama(kind, dtype, compute_dtype=autocast_dtype), use_dora=True, lora_dropout=dropout_p)
    judge = Judged(with_magnitudes(model), autocast_dtype, exact=dense)
    for draw in range(4):
        judge.add(inputs_of(seed=draw), seed=draw)
    compute = autocast_dtype or dtype
    assert not judge.failures(oracle.FLOOR[compute, compute])
    assert not fastlora.peft.fallbacks(judge.fused)


def test_eight_bits() -> None:
    """Against the dense weight: a copy of PEFT's model in 8 bits loses its scales."""
    layer = layers.find(
        with_magnitudes(accelerated(nn.ModuleList([random_layer("int8")]), target_modules=["0"], use_dora=True))
    )
    (fused,) = layer.values()
    x, weight = torch.randn(9, 24), quantized.weight_of(fused.base_layer).dequantize(torch.float32)
    A, B, magnitude = (part["default"].weight for part in (fused.lora_A, fused.lora_B, fused.lora_magnitude_vector))
    expected = reference.dora_linear(x, weight, A, B, magnitude=magnitude, scaling=1.5)
    assert oracle.relative_error(fused(x).detach(), expected.detach()) < 2 * oracle.FLOOR[torch.float32, torch.float32]
    assert not fused._fastlora_tally.fallbacks


def layer_of(**options: Any) -> tuple[Any, Any]:
    """An accelerated DoRA layer of 256 x 320 in bfloat16 with float32 adapters, and PEFT's."""
    torch.manual_seed(0)
    model = wrap(nn.ModuleList([nn.Linear(256, 320)]).bfloat16(), target_modules=["0"], use_dora=True, **options)
    fused = copy.deepcopy(with_magnitudes(model))
    fastlora.accelerate(fused)
    return fused.base_model.model[0], model.base_model.model[0]


@pytest.mark.parametrize(("dropout_p", "share"), [(0.0, 0.4), (0.1, 0.36)])
def test_bytes_saved(dropout_p: float, share: float) -> None:
    """z and x, for PEFT's base output, LoRA output and float32 copy of x, and its product B A."""
    x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    fused, own = layer_of(lora_dropout=dropout_p)
    held = [sum(tensor.nbytes for tensor in saved_by(partial(layer, x))) for layer in (fused, own)]
    assert held[0] < share * held[1]


def test_dropout_that_peft_would_not_apply() -> None:
    """The forward of DoRA asks the layer for its mode, not its dropout."""
    fused, own = layer_of(lora_dropout=0.5)
    x = torch.randn(9, 256, dtype=torch.bfloat16)
    for layer in (fused, own):
        layer.training = False
    y, expected = fused(x).detach(), own(x).detach()
    assert not fused._fastlora_tally.fallbacks
    assert oracle.relative_error(y, expected) < 2 * oracle.FLOOR[torch.bfloat16, torch.bfloat16]


def test_merging_and_switching_stay_pefts() -> None:
    fused, own = layer_of()
    x = torch.randn(9, 256, dtype=torch.bfloat16)
    for layer in (fused, own):
        layer.merge()
    assert torch.equal(fused.base_layer.weight, own.base_layer.weight)
    assert torch.equal(fused(x), own(x))
    fused.unmerge()
    own.unmerge()
    assert oracle.relative_error(fused(x).detach(), own(x).detach()) < 2 * oracle.FLOOR[torch.bfloat16, torch.bfloat16]


def test_a_magnitude_that_is_missing_or_altered() -> None:
    fused, own = layer_of()
    x = torch.randn(9, 256, dtype=torch.bfloat16)
    fused.lora_magnitude_vector["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="the adapter's modules have hooks"):
        assert torch.equal(fused(x), own(x))
    del fused.lora_magnitude_vector["default"]
    with pytest.raises(ValueError, match=r"the DoRA adapter 'default' has no magnitude: lora_magnitude_vector holds \[\]"):
        fused(x)
