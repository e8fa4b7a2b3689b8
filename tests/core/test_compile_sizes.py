"""torch.compile and torch.export with changing lengths and scalings: as few graphs as eager PyTorch needs.

Padded fine-tuning changes the length with every batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import hotswap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora import FusedLoraLinear, lora_linears, oracle

FLOOR = 2 * oracle.FLOOR[torch.float32, torch.float32]  # of two results that are each within it of the truth


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


def injected(network: nn.Module, **options: Any) -> nn.Module:
    return fastlora.inject(network, target_modules=["0", "2"], r=4, lora_dropout=0.1, **options)


def accelerated(network: nn.Module) -> nn.Module:
    model = get_peft_model(network, LoraConfig(r=4, lora_dropout=0.1, target_modules=["0", "2"]))
    fastlora.accelerate(model)
    return model


class Group(FusedLoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return lora_linears(x, [self._projection(x)])[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": lambda: nn.Linear(16, 24),
    "FusedLoraLinear": lambda: FusedLoraLinear(16, 24, r=4, lora_dropout=0.1),
    "injected": lambda: injected(tower()),
    "accelerated": lambda: accelerated(tower()),
    "hot-swapped": lambda: hotswap.prepare_model_for_compiled_hotswap(model := accelerated(tower())) or model,
    "DoRA": lambda: injected(tower(), use_dora=True),
    "embedding": lambda: injected(nn.Sequential(nn.Embedding(16, 24))),
    "accelerated embedding": lambda: accelerated(nn.Sequential(nn.Embedding(16, 24))),
    "convolution": lambda: injected(nn.Sequential(nn.Conv1d(2, 24, 3))),
    "group": lambda: Group(16, 24, r=4),
}
PLAIN = [(name, (2,), "aot_eager") for name in list(MODELS)[:4]]
LENGTHS = [*PLAIN, ("FusedLoraLinear", (), "aot_eager"), ("accelerated", (2,), "inductor")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "batch", "compiler"), LENGTHS)
def test_twelve_lengths_take_two_graphs(name: str, batch: tuple[int, ...], compiler: str) -> None:
    """The first length is compiled as it is, the second makes it dynamic, forward and backward."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(MODELS[name](), fullgraph=True, backend=counter)
    for length in range(3, 15):
        compiled(torch.randn(*batch, length, 16, requires_grad=True)).sum().backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", list(MODELS)[3:])
def test_twelve_scalings_take_two_graphs(name: str) -> None:
    """As with lengths; one in a tensor is dynamic from the first.  Outputs and gradients are those without the compiler."""
    counter, model = CompileCounterWithBackend("aot_eager"), MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    factors = [nn.init.normal_(p).requires_grad_() for key, p in model.named_parameters() if "lora_" in key]
    x = torch.randint(16, (3, 5)) if "embedding" in name else torch.randn(3, 2, 16)
    for scaling in (0.05 + step / 7 for step in range(12)):
        for layer in model.modules():
            if isinstance(held := getattr(layer, "scaling", None), dict):
                held["default"] = held["default"].fill_(scaling) if name == "hot-swapped" else scaling
            layer.scaling = held if isinstance(held, dict) else scaling
        results = []
        for call in (model, compiled):
            torch.manual_seed(1)
            y = call(x)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), factors)))
        assert all(oracle.relative_error(a, b) <= FLOOR for a, b in zip(*results, strict=True))
    assert counter.frame_count == (1 if name == "hot-swapped" else 2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export_with_a_dynamic_batch_and_sequence(mode: str) -> None:
    layer = FusedLoraLinear(16, 24, r=4).train(mode == "train")
    nn.init.normal_(layer.lora_B)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.export.export(layer, (torch.randn(2, 5, 16),), dynamic_shapes=(dynamic,))
    for shape in ((3, 7, 16), (8, 2, 16)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), layer(x))
