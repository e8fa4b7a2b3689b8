"""torch.compile of accelerated layers: one graph where PEFT's is one, and new graphs when the decision changes."""

import pytest
import quantized_layers
import torch
from peft_models import FLOOR, accelerated, wrap
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora import oracle


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12))


@pytest.mark.parametrize(("kind", "dynamic"), [(None, False), (None, True), ("nf4 double", True), ("int8", None)])
def test_compiles_whole(kind: str | None, dynamic: bool | None) -> None:
    base = linear()
    if kind is not None:
        base[0] = quantized_layers.quantize(base[0].weight, kind, base[0].bias)
        base.is_loaded_in_4bit = base.is_loaded_in_8bit = True
    model = accelerated(base, target_modules=["0"], lora_dropout=0.2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    weight = model.base_model.model[0].lora_A["default"].weight
    for rows in (5, 7):
        x, results = torch.randn(rows, 8), []
        for call in (model, compiled):
            torch.manual_seed(1)
            y = call(x)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), weight)))
        assert all(oracle.relative_error(b, a) <= FLOOR for a, b in zip(*results, strict=True))
    assert fastlora.peft.fallbacks(model) == {}


def test_compiled_fallbacks_are_counted_where_they_are_traced() -> None:
    model = accelerated(linear(), target_modules=["0"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    fused = compiled(x)
    model.base_model.model[0].base_layer.weight.requires_grad_()
    with pytest.warns(UserWarning, match="its base weight is trainable"):
        traced = compiled(x)
    assert torch.equal(compiled(x), traced)
    assert oracle.relative_error(traced, fused) <= FLOOR
    assert fastlora.peft.fallbacks(model) == {"its base weight is trainable": {"base_model.model.0": 1}}


def test_accelerating_after_compiling_takes_effect() -> None:
    model = wrap(linear(), target_modules=["0"])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 8)
    compiled(x)
    assert len(fastlora.accelerate(compiled).taken) == 1
    compiled(x)
    fastlora.decelerate(compiled)
    compiled(x)
    names = "LoraLinearFunction", "autograd_function_apply"
    fused = [any(name in str(made.graph) for name in names) for made in counter.graphs]
    assert fused == [False, True]  # the third call runs the first graph


def test_switching_state_recompiles() -> None:
    model = accelerated(linear(), target_modules=["0"])
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 8)
    before = compiled(x)
    with model.disable_adapter():
        assert torch.equal(compiled(x), model.base_model.model[0].base_layer(x))
    model.merge_adapter()
    assert oracle.relative_error(compiled(x), before.detach()) <= 2 * FLOOR
    model.unmerge_adapter()
    assert oracle.relative_error(compiled(x), before.detach()) <= 2 * FLOOR
