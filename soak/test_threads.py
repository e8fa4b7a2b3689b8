"""Two threads on one module, forward and backward, each on inputs of its own: the results are those of one thread, bit for bit.

The torch backend only: Triton's interpreter keeps the program that it runs in global variables.
"""

import threading
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear, lora_linear

pytestmark = pytest.mark.usefixtures("torch_backend")
THREADS = 2
Call = Callable[[Tensor, int], Tensor]  # of x and a seed


def of_module() -> tuple[Call, list[Tensor]]:
    layer = FusedLoraLinear(64, 48, r=4)
    nn.init.normal_(layer.lora_B)
    return lambda x, seed: layer(x), [layer.lora_A, layer.lora_B]


def of_accelerated() -> tuple[Call, list[Tensor]]:
    config = peft.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)), config)
    fastlora.accelerate(model)
    return lambda x, seed: model(x), [p for p in model.parameters() if p.requires_grad]


def of_function() -> tuple[Call, list[Tensor]]:
    layer = FusedLoraLinear(64, 48, r=4)
    nn.init.normal_(layer.lora_B)
    weights = layer.weight, layer.lora_A, layer.lora_B, layer.bias
    return lambda x, seed: lora_linear(x, *weights, dropout_p=0.3, seed=seed), [layer.lora_A, layer.lora_B]


@pytest.mark.parametrize("build", [of_module, of_accelerated, of_function])
def test_two_threads(build: Callable[[], tuple[Call, list[Tensor]]], counted) -> None:
    torch.manual_seed(0)
    call, weights = build()

    def results(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn((33, 64), generator=generator, requires_grad=True)
        y = call(x, number)
        return [y.detach(), *torch.autograd.grad(y, [x, *weights], torch.randn(y.shape, generator=generator))]

    for batch in counted(500):
        numbers = range(batch * 8, batch * 8 + 8)
        found: dict[int, list[Tensor]] = {}
        barrier = threading.Barrier(THREADS)

        def work(own: range, found=found, barrier=barrier) -> None:
            barrier.wait()
            for number in own:
                found[number] = results(number)

        threads = [threading.Thread(target=work, args=(numbers[at::THREADS],)) for at in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == list(numbers)
        for number in numbers:
            assert all(map(torch.equal, found[number], results(number))), number
