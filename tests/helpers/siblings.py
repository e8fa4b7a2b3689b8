"""A small model whose layers share x, and how two such models are compared."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora import inject, oracle

FLOOR = oracle.FLOOR[torch.float32, torch.float32]


class Siblings(nn.Module):
    """Three linears of one x, which a layer before them computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(8, 5, bias=False), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.siblings(torch.tanh(self.first(x)))

    def siblings(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]


def model_of(p: float = 0.0, groups: bool = True) -> Any:
    """The siblings with adapters of different ranks, in training mode; the same ones each time."""
    torch.manual_seed(0)
    model = inject(
        Siblings(), target_modules=["q", "k", "v"], r=3, rank_pattern={"k": 2}, lora_dropout=p, groups=groups, lora_alpha=5
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.train()


def x_of(seed: int = 1, cols: int = 8) -> Tensor:
    return torch.randn(5, cols, generator=torch.Generator().manual_seed(seed))


def learned(p: float = 0.0, groups: bool = True) -> Any:
    """The model after one training forward: its groups are active from now on."""
    model = model_of(p, groups)
    model.siblings(x_of(9))
    return model


def gradients(model: nn.Module, ys: list[Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    sum((y.float() * x_of(7, y.shape[-1])).sum() for y in ys if y.requires_grad).backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def assert_close(ours: Any, theirs: Any) -> None:
    pairs = [(ours[key], theirs[key]) for key in theirs] if isinstance(theirs, dict) else list(zip(ours, theirs, strict=True))
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
            assert oracle.relative_error(one.detach(), other.detach()) <= 2 * oracle.FLOOR[one.dtype, torch.float32]
