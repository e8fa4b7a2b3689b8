"""Accelerated models give PEFT's logits, gradients and loss curves, judged in float64 by the oracle's rule."""

from typing import Any

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import MODELS, PRECISIONS, Judged, autocast, bound_of, build, counted_calls, inputs_of, logits_of, wrap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import oracle
from fastlora.peft import layers

DRAWS = 6


def judged(kind: str, precision: str, *, tensor_scalings: bool = False, **options: Any) -> tuple[Judged, list[str]]:
    """The verdict, and the outputs that fail, over DRAWS inputs and masks."""
    dtype, autocast_dtype = PRECISIONS[precision]
    model = wrap(build(kind, dtype), **options)
    if tensor_scalings:
        prepare_model_for_compiled_hotswap(model)
    judge = Judged(model, autocast_dtype)
    for draw in range(DRAWS):
        judge.add(inputs_of(kind, seed=draw), seed=draw)
    compute = autocast_dtype or dtype
    return judge, judge.failures(oracle.FLOOR[compute, compute])


@pytest.mark.filterwarnings("ignore:r=4 is above min", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_every_gradient(kind: str, precision: str, dropout_p: float) -> None:
    with counted_calls() as calls:
        judge, failures = judged(kind, precision, lora_dropout=dropout_p)
    assert not failures
    found = layers.find(judge.fused)
    assert len(calls) == DRAWS * len(found) > 0
    assert fastlora.peft.fallbacks(judge.fused) == {}
    adapters = [name for name in judge.sums if "lora_" in name]
    assert len(adapters) == 2 * len(found) == len(judge.sums) - 1


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_gradients_of_trainable_biases(bias: str) -> None:
    judge, failures = judged("qwen2", "float32", bias=bias)
    assert not failures
    assert sum(name.endswith("q_proj.base_layer.bias") for name in judge.sums) == 2


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 11}}], ids=str
)
def test_scaling_rules_and_patterns(options: dict[str, Any]) -> None:
    assert not judged("llama", "float32", lora_dropout=0.2, **options)[1]


@pytest.mark.parametrize("tensor_scalings", [False, True])
def test_half_precision_adapters(tensor_scalings: bool) -> None:
    options = {"autocast_adapter_dtype": False, "lora_dropout": 0.2, "lora_alpha": 7}
    judge, failures = judged("llama", "mixed", tensor_scalings=tensor_scalings, **options)
    assert not failures
    assert fastlora.peft.fallbacks(judge.fused) == {}


PLANTED = {
    "no dropout": {"dropout_p": 0.0},
    "twice the dropout": {"dropout_p": 0.4},
    "another mask": {"seed": 5},
    "no adapter": {"scaling": 0.0},
    "scaled by the rank": {"scaling": 6.0},
}


@pytest.mark.parametrize("precision", ["float32", "mixed-autocast"])
@pytest.mark.parametrize("planted", PLANTED)
def test_planted_errors_are_seen(monkeypatch: pytest.MonkeyPatch, planted: str, precision: str) -> None:
    def wrong(*tensors: Tensor, **options: Any) -> Tensor:
        return fastlora.lora_linear(*tensors, **{**options, **PLANTED[planted]})

    monkeypatch.setattr("fastlora.peft.fused.lora_linear", wrong)
    judge, failures = judged("llama", precision, lora_dropout=0.2)
    assert len(failures) == len(judge.sums)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ten_training_steps_give_the_same_loss_curve(precision: str) -> None:
    dtype, autocast_dtype = PRECISIONS[precision]
    judge = Judged(wrap(build("llama", dtype), lora_dropout=0.1), autocast_dtype)
    curves = [curve(judge.truth, None), curve(judge.fused, autocast_dtype), curve(judge.eager, autocast_dtype)]
    truth, fused, eager = curves
    assert truth[-1] < truth[0] - 0.1  # it learns
    compute = autocast_dtype or dtype
    assert oracle.relative_error(fused, truth) <= bound_of(oracle.relative_error(eager, truth), oracle.FLOOR[compute, compute])


def curve(model: nn.Module, autocast_dtype: torch.dtype | None) -> Tensor:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for step in range(10):
        inputs = inputs_of(seed=step % 2)
        with autocast(autocast_dtype):
            predicted = logits_of(model, inputs)[:, :-1].flatten(0, 1).double()
            loss = nn.functional.cross_entropy(predicted, inputs["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


class Float32Outputs(TorchDispatchMode):
    """The number of elements of each float32 tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else (out,)
        self.sizes += [t.numel() for t in made if isinstance(t, Tensor) and t.dtype == torch.float32]
        return out


def largest_float32(model: nn.Module, x: Tensor) -> int:
    """The most elements of a float32 tensor that a step makes. What it saves for backward is among these."""
    with Float32Outputs() as made:
        model(x).sum().backward()
    return max(made.sizes)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_adapters_make_no_float32_copy_of_x(dropout_p: float) -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)), target_modules=["0"], lora_dropout=dropout_p)
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    assert largest_float32(wrapped, x) == x.numel()
    fastlora.accelerate(wrapped)
    assert largest_float32(wrapped, x) <= 256 * 4  # the adapters' gradients, and S
