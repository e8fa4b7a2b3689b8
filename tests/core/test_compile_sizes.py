"""torch.compile and torch.export with changing lengths: as many graphs as nn.Linear needs, as padded fine-tuning wants it."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora import FusedLoraLinear

LENGTHS = range(3, 15)


class Tower(nn.Module):
    """Two linears with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def injected(p: float) -> nn.Module:
    return fastlora.inject(Tower(), target_modules=["up", "down"], r=4, lora_dropout=p)


def accelerated(p: float) -> nn.Module:
    model = get_peft_model(Tower(), LoraConfig(r=4, lora_dropout=p, target_modules=["up", "down"]))
    fastlora.accelerate(model)
    return model


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "nn.Linear": lambda p: nn.Linear(16, 24),
    "FusedLoraLinear": lambda p: FusedLoraLinear(16, 24, r=4, lora_dropout=p),
    "injected": injected,
    "accelerated": accelerated,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "dims", "compiler"),
    [*((name, 3, "aot_eager") for name in MODELS), ("FusedLoraLinear", 2, "aot_eager"), ("accelerated", 3, "inductor")],
)
def test_twelve_lengths_take_two_graphs(name: str, dims: int, compiler: str) -> None:
    """The first length is compiled as it is, the second makes it dynamic, forward and backward."""
    counter = CompileCounterWithBackend(compiler)
    model = torch.compile(MODELS[name](0.1), fullgraph=True, backend=counter)
    for length in LENGTHS:
        shape = (length, 16) if dims == 2 else (2, length, 16)
        model(torch.randn(shape, requires_grad=True)).sum().backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export_with_a_dynamic_batch_and_sequence(mode: str) -> None:
    layer = FusedLoraLinear(16, 24, r=4).train(mode == "train")
    nn.init.normal_(layer.lora_B)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.export.export(layer, (torch.randn(2, 5, 16),), dynamic_shapes=(dynamic,))
    for shape in ((3, 7, 16), (8, 2, 16)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), layer(x))
