"""Chained addmm_ of whole blocks, as Unsloth and Axolotl do it, without dropout.

    forward     y = x Wᵀ, then y += scaling · (x Aᵀ) Bᵀ in place
    backward    dx = dy W, then dx += scaling · (dy B) A in place, and so on for each projection of x: one tensor, no adds

x is saved once; x Aᵀ is made again in backward, as in Unsloth.  The gated MLP saves x, e = gate(x) and g = up(x), and makes
h = silu(e) · g again.  Their kernels for this product and its gradients are what inductor makes of it here on a GPU; on a CPU
they are torch's operations.  Unsloth writes dx into x and the other gradients into e and g; here saved tensors are not written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *tensors)
        ctx.scaling, ctx.n = scaling, n
        return tuple(_linear(x, tensors[i::n], scaling) for i in range(n))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        dx, grads = _backward(x, dys, [tensors[i :: ctx.n] for i in range(ctx.n)], ctx.scaling)
        return dx, None, None, *[None] * ctx.n, *(dA for dA, _ in grads), *(dB for _, dB in grads)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *tensors: Tensor) -> Tensor:
        gate, up, down = (tensors[i::3] for i in range(3))
        e, g = _linear(x, gate, scaling), _linear(x, up, scaling)
        ctx.save_for_backward(x, e, g, *tensors)
        ctx.scaling = scaling
        return _linear(_on(x, _gated)(e, g), down, scaling)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, e, g, *tensors = ctx.saved_tensors
        gate, up, down = (tensors[i::3] for i in range(3))
        dh = _add_dx(None, dys[0], down, ctx.scaling)
        h, de, dg = _on(x, _gated_backward)(dh, e, g)
        of_down = _adapters(h, dys[0], down, ctx.scaling)
        dx, of_others = _backward(x, (de, dg), (gate, up), ctx.scaling)
        grads = [*of_others, of_down]
        return dx, None, None, None, None, *(dA for dA, _ in grads), *(dB for _, dB in grads)


def projections(x: Tensor, weights: Sequence[Sequence[Any]], scaling: float) -> tuple[Tensor, ...]:
    """y of each (W, A, B, None) in `weights`, for x (M, in); all in one dtype, without biases."""
    return _Projections.apply(x, scaling, len(weights), *_flat(weights))


def mlp(x: Tensor, weights: Sequence[Sequence[Any]], scaling: float) -> Tensor:
    """down(silu(gate(x)) · up(x)) of gate, up and down, otherwise as `projections`."""
    return _Mlp.apply(x, scaling, *_flat(weights))


def _flat(weights: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Every W, then every A, then every B."""
    return [own[i] for i in range(3) for own in weights]


def _linear(x: Tensor, weights: Sequence[Tensor], scaling: float) -> Tensor:
    W, A, B = weights
    return (x @ W.t()).addmm_(x @ A.t(), B.t(), alpha=scaling)


def _backward(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], scaling: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """dx, and (dA, dB) of each projection."""
    grads = [_adapters(x, dy, own, scaling) for dy, own in zip(dys, weights, strict=True)]
    dx = None
    for dy, own in zip(dys, weights, strict=True):
        dx = _add_dx(dx, dy, own, scaling)
    assert dx is not None
    return dx, grads


def _add_dx(dx: Tensor | None, dy: Tensor, weights: Sequence[Tensor], scaling: float) -> Tensor:
    W, A, B = weights
    return (dy @ W if dx is None else dx.addmm_(dy, W)).addmm_(dy @ B, A, alpha=scaling)


def _adapters(x: Tensor, dy: Tensor, weights: Sequence[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """dA, dB"""
    _, A, B = weights
    dA = torch.empty_like(A).addmm_((dy @ B).t(), x, beta=0, alpha=scaling)
    return dA, torch.empty_like(B).addmm_(dy.t(), x @ A.t(), beta=0, alpha=scaling)


def _gated(e: Tensor, g: Tensor) -> Tensor:
    return F.silu(e) * g


def _gated_backward(dh: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, de, dg"""
    act = F.silu(e)
    return act * g, torch.ops.aten.silu_backward(dh * g, e), dh * act


def _on(x: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if x.is_cuda else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
