"""The two operators of `torch.library`: schemas, fakes, and the choice of the backend that runs them.

They are functional: no output aliases an input, nothing is written in place, and the seed is an explicit tensor, so that
fake tensors, functionalisation, CUDA graphs and activation checkpointing see all there is to see.  A gradient that is not
asked for comes back as an empty tensor, because a schema cannot return None.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora import torch_backend

_LIBRARY = torch.library.Library("fastlora", "DEF")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, str backend) -> (Tensor y, Tensor S)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? S, Tensor? seed, "
    "float scaling, float dropout_p, ScalarType adapter_dtype, str backend) -> (Tensor dx, Tensor dA, Tensor dB)"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of S and of every sum: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _steps(direction: str, backend: str) -> Callable[..., Any]:
    """The implementation of "forward" or "backward": on torch, or on Triton in the form that the backend names, if any."""
    if backend == "torch":
        return getattr(torch_backend, direction)
    from fastlora.kernels import steps as kernels  # Triton is imported where a kernel is to run, not with the package

    steps = getattr(kernels, direction)
    return steps if backend == "triton" else functools.partial(steps, choice=kernels.Choice(backend))


def as_rows(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K), also where K is 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.new_empty((tensor.shape[:-1].numel(), 0))


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y (..., out), S (M, r)): the operator lora_linear."""
    y, S = _steps("forward", backend)(as_rows(x), weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (..., in), dA (r, in), dB (out, r)): the operator lora_linear_backward."""
    dx, dA, dB = _steps("backward", backend)(
        as_rows(dy), None if x is None else as_rows(x), weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype
    )
    if dx is not None and weight is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    dx, dA, dB = (dy.new_empty(0) if grad is None else grad for grad in (dx, dA, dB))
    return dx, dA, dB


@torch.library.register_fake("fastlora::lora_linear", lib=_LIBRARY)
def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend):  # type: ignore[no-untyped-def]  # the schema types it
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]), dtype=accumulator(x.dtype))


@torch.library.register_fake("fastlora::lora_linear_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype, backend):  # type: ignore[no-untyped-def]  # the schema types it
    dx = dy.new_empty(0) if weight is None else dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    dA = dy.new_empty(0) if x is None else dy.new_empty((lora_B.shape[1], x.shape[-1]), dtype=adapter_dtype)
    dB = dy.new_empty(0) if S is None else dy.new_empty((dy.shape[-1], S.shape[1]), dtype=adapter_dtype)
    return dx, dA, dB


_LIBRARY.impl("lora_linear", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linear_backward", backward, "CompositeExplicitAutograd")

LORA_LINEAR = torch.ops.fastlora.lora_linear.default
LORA_LINEAR_BACKWARD = torch.ops.fastlora.lora_linear_backward.default
