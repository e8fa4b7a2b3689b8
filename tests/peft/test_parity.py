"""Whole models: accelerated, they give PEFT's logits, gradients and loss curves, judged in float64 by the oracle's rule."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import MODELS, bound_of, build, counted_calls, inputs_of, logits_of, run, with_masked_dropout, wrap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import oracle
from fastlora.peft import layers

DRAWS = 6
#: name -> (dtype of the base, autocast); adapters are float32 in all of them.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "mixed": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "mixed-autocast": (torch.bfloat16, torch.bfloat16),
}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


class Judged:
    """Σ ‖error‖² of an accelerated model and of PEFT's, by output, over several inputs and masks.

    In a whole network one rounding moves every later number, so the two errors of one draw differ by luck.
    """

    def __init__(self, model: nn.Module, autocast_dtype: torch.dtype | None = None) -> None:
        self.autocast_dtype = autocast_dtype
        self.fused = copy.deepcopy(model)
        self.eager = with_masked_dropout(model)
        self.truth = copy.deepcopy(self.eager).double()
        assert fastlora.accelerate(self.fused).taken
        self.sums: dict[str, list[float]] = {}

    def add(self, inputs: dict[str, Tensor], seed: int) -> None:
        truth = run(self.truth, inputs, seed)
        with autocast(self.autocast_dtype):
            results = run(self.fused, inputs, seed), run(self.eager, inputs, seed)
        for name, ref in truth.items():
            sums = self.sums.setdefault(name, [0.0, 0.0, 0.0])
            for at, result in enumerate(results):
                assert result[name].dtype == results[1][name].dtype, name
                sums[at] += float((result[name].double() - ref).square().sum())
            sums[2] += float(ref.square().sum())

    def failures(self, floor: float) -> list[str]:
        failed = []
        for name, (fused, eager, ref) in self.sums.items():
            error, bound = (fused / ref) ** 0.5, bound_of((eager / ref) ** 0.5, floor)
            if not error <= bound:
                failed.append(f"{name}: {error:.2e} > {bound:.2e}")
        return failed


def judged(kind: str, precision: str, draws: int = DRAWS, **options: Any) -> tuple[Judged, list[str]]:
    dtype, autocast_dtype = PRECISIONS[precision]
    judge = Judged(wrap(build(kind, dtype), **options), autocast_dtype)
    for draw in range(draws):
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


@pytest.mark.parametrize("scalings", ["floats", "tensors"])
def test_half_precision_adapters(scalings: str) -> None:
    dtype = torch.bfloat16
    model = wrap(build("llama", dtype), autocast_adapter_dtype=False, lora_dropout=0.2, lora_alpha=7)
    if scalings == "tensors":
        prepare_model_for_compiled_hotswap(model)
    judge = Judged(model)
    for draw in range(DRAWS):
        judge.add(inputs_of("llama", seed=draw), seed=draw)
    assert not judge.failures(oracle.FLOOR[dtype, dtype])
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

    monkeypatch.setattr(layers, "lora_linear", wrong)
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
            logits = logits_of(model, inputs)
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).to(torch.float64), inputs["input_ids"][:, 1:].flatten()
            )
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
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.sizes.append(tensor.numel())
        return out


def largest_float32(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """The most elements of a float32 tensor that a step makes, and that it saves for backward."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            saved.append(tensor.numel())
        return tensor

    with Float32Outputs() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return max(made.sizes), max(saved)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_adapters_make_no_float32_copy_of_x(dropout_p: float) -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)), target_modules=["0"], lora_dropout=dropout_p)
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    assert min(largest_float32(wrapped, x)) == x.numel()
    fastlora.accelerate(wrapped)
    assert max(largest_float32(wrapped, x)) <= 256 * 4  # the adapters' gradients, and S
