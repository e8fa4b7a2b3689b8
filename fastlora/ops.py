"""The two operators of `torch.library`: schemas, fakes, and the backend that runs them.

They are functional: no output aliases an input, nothing is written in place, and the seed is an explicit tensor.  So fake
tensors, functionalisation, CUDA graphs and activation checkpointing see everything.  A schema cannot return None, so a gradient
that nobody asked for comes back as an empty tensor.

The backend "torch" makes the mask once: lora_linear returns it packed, one bit an element, and lora_linear_backward takes it.
The kernels make it where they need it: the mask returned is empty, and lora_linear_backward takes the seed in its place.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastlora import torch_backend
from fastlora.dropout import LANES, packed_mask
from fastlora.rows import accumulator, as_rows

_LIBRARY = torch.library.Library("fastlora", "DEF")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, str backend) -> (Tensor y, Tensor S, Tensor mask)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? S, Tensor? mask, "
    "float scaling, float dropout_p, ScalarType adapter_dtype, str backend) -> (Tensor dx, Tensor dA, Tensor dB)"
)


@functools.cache
def _implementation(direction: str, backend: str) -> Callable[..., Any]:
    """What runs "forward" or "backward" on 2-D tensors."""
    if backend == "torch":
        return getattr(torch_backend, direction)
    from fastlora import dispatch  # not at the top: it imports Triton, which `import fastlora` and plain torch do without
    from fastlora.kernels import steps

    return functools.partial(getattr(steps, direction), choice=backend, plan=getattr(dispatch, f"plan_{direction}"))


def keeps_mask(seed: Tensor | None, backend: str) -> TypeGuard[Tensor]:
    """Whether backward takes the packed mask that forward made, in place of the seed."""
    return backend == "torch" and seed is not None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (..., out), S (M, r), mask): the operator lora_linear.

    y has its final shape: FSDP2 warns of modules that return a view.
    """
    y, rows = x.new_empty((*x.shape[:-1], weight.shape[0])), as_rows(x)
    mask = packed_mask(seed, rows.shape[0], rows.shape[1], dropout_p) if keeps_mask(seed, backend) else None
    run = _implementation("forward", backend)
    S = run(rows, weight, lora_A, lora_B, bias, seed if mask is None else mask, scaling, dropout_p, as_rows(y))[1]
    return y, S, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (..., in), dA (r, in), dB (out, r)): the operator lora_linear_backward."""
    dx = dy.new_empty(0 if weight is None else (*dy.shape[:-1], weight.shape[1]))
    rows = None if x is None else as_rows(x)
    out = None if weight is None else as_rows(dx)
    run = _implementation("backward", backend)
    _, dA, dB = run(as_rows(dy), rows, weight, lora_A, lora_B, S, mask, scaling, dropout_p, adapter_dtype, out)
    return dx, dy.new_empty(0) if dA is None else dA, dy.new_empty(0) if dB is None else dB


@torch.library.register_fake("fastlora::lora_linear", lib=_LIBRARY)
def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend):  # type: ignore[no-untyped-def]  # the schema types it
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows = math.prod(x.shape[:-1])  # Size.numel() specialises a symbolic size and recompiles for every length
    mask = (rows, -(-x.shape[-1] // LANES)) if keeps_mask(seed, backend) else 0
    return y, x.new_empty((rows, lora_A.shape[0]), dtype=accumulator(x.dtype)), x.new_empty(mask, dtype=torch.uint8)


@torch.library.register_fake("fastlora::lora_linear_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight, lora_A, lora_B, S, mask, scaling, dropout_p, adapter_dtype, backend):  # type: ignore[no-untyped-def]  # the schema types it
    dx = dy.new_empty(0 if weight is None else (*dy.shape[:-1], weight.shape[1]))
    dA = dy.new_empty(0) if x is None else dy.new_empty((lora_B.shape[1], x.shape[-1]), dtype=adapter_dtype)
    dB = dy.new_empty(0) if S is None else dy.new_empty((dy.shape[-1], S.shape[1]), dtype=adapter_dtype)
    return dx, dA, dB


_LIBRARY.impl("lora_linear", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linear_backward", backward, "CompositeExplicitAutograd")

LORA_LINEAR = torch.ops.fastlora.lora_linear.default
LORA_LINEAR_BACKWARD = torch.ops.fastlora.lora_linear_backward.default
