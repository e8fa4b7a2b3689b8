"""One gated MLP to judge: its inputs, and the eager computation with the masks of `lora_mlp`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import Projection, dropout_mask, lora_mlp, oracle, reference
from fastlora.dropout import threshold

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class Mlp:
    """sizes: rows, in, intermediate, out.  ranks: of gate, up and down, 0 for no adapter."""

    sizes: tuple[int, int, int, int] = (33, 40, 56, 24)
    ranks: tuple[int, int, int] = (4, 4, 4)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # of x and W, of A and B
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    activation: str = "silu"
    bias: bool = True
    seed: int = 5

    def draw(self) -> tuple[list[Tensor], Tensor]:
        """(the leaves x, then W, A, B and bias of each linear, where there is one; dy)."""
        M, K, inner, N = self.sizes
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, fan_in: int = 1, dtype: torch.dtype = self.dtypes[0]) -> Tensor:
            return (torch.randn(shape, generator=generator) / max(fan_in, 1) ** 0.5).to(dtype)

        leaves = [normal(M, K).requires_grad_()]
        for (n, k), r in zip(((inner, K), (inner, K), (N, inner)), self.ranks, strict=True):
            leaves.append(normal(n, k, fan_in=k))
            if r:
                leaves.append(normal(r, k, fan_in=k, dtype=self.dtypes[1]).requires_grad_())
                leaves.append(normal(n, r, fan_in=r, dtype=self.dtypes[1]).requires_grad_())
            if self.bias:
                leaves.append(normal(n).requires_grad_())
        return leaves, normal(M, N)

    def projections(self, leaves: list[Tensor]) -> tuple[Tensor, list[Projection]]:
        """(x, gate, up and down) of these leaves."""
        x, *rest = leaves
        found = iter(rest)
        linears = []
        for r, p in zip(self.ranks, self.rates, strict=True):
            weight, A, B = next(found), *((next(found), next(found)) if r else (None, None))
            linears.append(Projection(weight, A, B, next(found) if self.bias else None, 1.5, p))
        return x, linears

    def fused(self, leaves: list[Tensor], **options: Any) -> Tensor:
        x, linears = self.projections(leaves)
        return lora_mlp(x, *linears, activation=self.activation, **{"seed": self.seed} | options)

    def eager(self, leaves: list[Tensor]) -> Tensor:
        """PEFT's computation, with the three masks of the seed."""
        x, linears = self.projections(leaves)

        def linear(x: Tensor, projection: Projection, index: int) -> Tensor:
            weight, A, B, bias, scaling, p = projection
            if A is None:
                return F.linear(x, weight, bias)
            mask = dropout_mask(self.seed, *x.shape, p, projection=index) if threshold(p) else None
            return reference.lora_linear(x, weight, A, B, bias, scaling=scaling, dropout_p=p, keep_mask=mask)

        h = ACTIVATIONS[self.activation](linear(x, linears[0], 0)) * linear(x, linears[1], 1)
        return linear(h, linears[2], 2)


def results(function: Any, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, and the gradient of every leaf that requires one."""
    y = function(leaves)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, trained, dy)]


def failures(mlp: Mlp, function: Any = None, **options: Any) -> list[str]:
    """The outputs of `lora_mlp`, or of `function`, that fail the oracle's rule."""
    leaves, dy = mlp.draw()
    fused = results(function or partial(mlp.fused, **options), leaves, dy)
    eager = results(mlp.eager, leaves, dy)
    exact = results(mlp.eager, [t.detach().double().requires_grad_(t.requires_grad) for t in leaves], dy.double())
    found = []
    for index, (ours, own, truth) in enumerate(zip(fused, eager, exact, strict=True)):
        error, bound = (oracle.relative_error(t, truth) for t in (ours, own))
        bound = max(oracle.EAGER_FACTOR * bound, oracle.FLOOR[mlp.dtypes[0], own.dtype])
        if not error <= bound or ours.dtype != own.dtype:
            found.append(f"output {index} {tuple(own.shape)}: {error:.1e}, bound {bound:.1e}, {ours.dtype}")
    return found
