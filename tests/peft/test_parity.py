"""Accelerated models give PEFT's logits, gradients and loss curves, judged in float64 by the oracle's rule."""

from typing import Any

import pytest
import torch
from peft_models import MODELS, PRECISIONS, Judged, build, counted_calls, inputs_of, wrap
from saved import saved_by
from torch import Tensor, nn

import fastlora
from fastlora import oracle
from fastlora.peft import layers

#: By what the forward computes in: errors in 16 bits differ by luck, see Judged.
DRAWS = {torch.float32: 2, torch.bfloat16: 6}
#: Every architecture, every mixture of dtypes, with and without dropout.
CASES = [(kind, precision, 0.3) for kind in MODELS for precision in ("float32", "mixed-autocast")]
CASES += [(kind, precision, 0.3) for kind in ("llama", "gpt2") for precision in ("mixed", "autocast")]
CASES += [("llama", precision, 0.0) for precision in PRECISIONS]


def judged(kind: str, precision: str, **options: Any) -> tuple[Judged, list[str]]:
    """The verdict, and the outputs that fail, over some inputs and masks."""
    dtype, autocast_dtype = PRECISIONS[precision]
    judge = Judged(wrap(build(kind, dtype), **options), autocast_dtype)
    compute = autocast_dtype or dtype
    for draw in range(DRAWS[compute]):
        judge.add(inputs_of(kind, seed=draw), seed=draw)
    return judge, judge.failures(oracle.FLOOR[compute, compute])


@pytest.mark.filterwarnings("ignore:r=4 is above min", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("kind", "precision", "dropout_p"), CASES)
def test_logits_and_every_gradient(kind: str, precision: str, dropout_p: float) -> None:
    with counted_calls() as calls:
        judge, failures = judged(kind, precision, lora_dropout=dropout_p)
    assert not failures
    found = layers.find(judge.fused)
    assert len(calls) == DRAWS[torch.float32 if precision == "float32" else torch.bfloat16] * len(found) > 0
    assert fastlora.peft.fallbacks(judge.fused) == {}
    adapters = [name for name in judge.sums if "lora_" in name]
    assert len(adapters) == 2 * len(found) == len(judge.sums) - 1


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "float32", {"bias": "all"}),
    ("qwen2", "float32", {"bias": "lora_only"}),
    ("llama", "float32", {"lora_dropout": 0.2, "use_rslora": True}),
    ("llama", "float32", {"lora_dropout": 0.2, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 11}}),
    ("llama", "mixed", {"lora_dropout": 0.2, "lora_alpha": 7, "autocast_adapter_dtype": False}),
]


@pytest.mark.parametrize(("kind", "precision", "options"), OPTIONS)
def test_options_of_the_adapter(kind: str, precision: str, options: dict[str, Any]) -> None:
    """Trainable biases, scaling rules, patterns, and adapters in 16 bits."""
    judge, failures = judged(kind, precision, **options)
    assert not failures
    assert fastlora.peft.fallbacks(judge.fused) == {}
    assert sum(name.endswith("q_proj.base_layer.bias") for name in judge.sums) == (2 if "bias" in options else 0)


@pytest.mark.parametrize("precision", ["float32", "mixed-autocast"])
@pytest.mark.parametrize(
    "planted", [{"dropout_p": 0.0}, {"dropout_p": 0.4}, {"seed": 5}, {"scaling": 0.0}, {"scaling": 6.0}], ids=str
)
def test_planted_errors_are_seen(monkeypatch: pytest.MonkeyPatch, planted: dict[str, Any], precision: str) -> None:
    def wrong(*tensors: Tensor, **options: Any) -> Tensor:
        return fastlora.lora_linear(*tensors, **options | planted)

    monkeypatch.setattr("fastlora.peft.fused.lora_linear", wrong)
    judge, failures = judged("llama", precision, lora_dropout=0.2)
    assert len(failures) == len(judge.sums)


def saved_float32(model: nn.Module, x: Tensor) -> int:
    """The most elements of a float32 tensor that autograd saves."""
    return max(tensor.numel() * (tensor.dtype == torch.float32) for tensor in saved_by(lambda: model(x)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_adapters_keep_no_float32_copy_of_x(dropout_p: float) -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)), target_modules=["0"], lora_dropout=dropout_p)
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    assert saved_float32(wrapped, x) == x.numel()
    fastlora.accelerate(wrapped)
    assert saved_float32(wrapped, x) <= 256 * 4  # the adapters, and S
