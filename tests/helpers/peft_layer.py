"""One accelerated PEFT layer, its input, and ways to change it: shared by the tests of single calls."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft_models import accelerated
from torch import Tensor, nn

from fastlora.peft import layers


def layer_of(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One accelerated layer with a random adapter, in training mode."""
    torch.manual_seed(0)
    model = nn.ModuleList([base or nn.Linear(8, 12)]).to(dtype)
    return accelerated(model, target_modules=["0"], **options).base_model.model[0]


def pefts(layer: Any) -> Any:
    """A copy of the layer that is PEFT's again."""
    copied = copy.deepcopy(layer)
    layers.restore(copied)
    return copied


def fallbacks_of(layer: Any) -> dict[str, int]:
    return dict(layer._fastlora_tally.fallbacks)


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def forward_of_its_own(module: nn.Module) -> None:
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


def set_dtypes(A: torch.dtype, B: torch.dtype) -> Callable[[Any], Any]:
    return lambda layer: [half.to(dtype) for half, dtype in ((layer.lora_A, A), (layer.lora_B, B))]
