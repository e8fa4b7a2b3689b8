"""The operators of several adapters on one weight.  `fastlora.variants.several` has their mathematics.

As in `fastlora.ops` they are functional, and the backend "torch" keeps the packed masks for backward.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import torch_backend
from fastlora.blocks.group import padded_rank, passes_of, pick, stack
from fastlora.dropout import LANES, keep_scale
from fastlora.rows import accumulator, as_rows, without_autocast

_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define(
    "lora_adapters(Tensor x, Tensor weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor? bias, Tensor? route, Tensor? seed, "
    "int[] words, float[] dropout_ps, str backend) -> (Tensor y, Tensor U, Tensor[] masks)"
)
_LIBRARY.define(
    "lora_adapters_backward(Tensor dy, Tensor x, Tensor? weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor U, Tensor? route, "
    "Tensor[] masks, Tensor? seed, int[] words, float[] dropout_ps, str backend) -> (Tensor dx, Tensor[] dAs, Tensor[] dBs)"
)


@without_autocast
def forward(
    x: Tensor,
    weight: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    route: Tensor | None,
    seed: Tensor | None,
    words: Sequence[int],
    dropout_ps: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y (..., out), U (M, R) of all parts, the packed masks of each pass): the operator lora_adapters."""
    rows, y = as_rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
    parts: dict[int, Tensor] = {}
    masks = []
    for step in passes_of(words, dropout_ps, lora_As):
        some_As = pick(lora_As, step.members)
        A, _ = stack(some_As, [], padded_rank(some_As))
        if backend == "torch":
            made = step.packed(seed, rows)
            masks.append(torch.stack(made) if made else x.new_empty(0, dtype=torch.uint8))
            S = torch_backend.shrink(rows, A, made or [None], step.dropout_p).unflatten(1, (len(some_As), -1)).transpose(0, 1)
        else:
            from fastlora.kernels import group, several  # not at the top: see `ops._implementation`

            S = group.shrink_shared(rows, A, seed if step.masks else None, step.words, step.dropout_p)
        for i, own, part_A in zip(step.members, S, some_As, strict=True):
            parts[i] = own[:, : part_A.shape[0]]
    U = torch.cat([parts[i] for i in range(len(lora_As))], 1)
    if route is not None:
        U.masked_fill_(~route, 0.0)
    B, out = torch.cat(list(lora_Bs), 1), as_rows(y)
    if backend == "torch":
        torch_backend.expand(rows, weight, U, B, bias, 1.0, out)
    else:
        from fastlora import dispatch

        several.expand(rows, weight, U, B, bias, out, backend, dispatch.plan_y)
    return y, U, masks


@without_autocast
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    U: Tensor,
    route: Tensor | None,
    masks: Sequence[Tensor],
    seed: Tensor | None,
    words: Sequence[int],
    dropout_ps: Sequence[float],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx (..., in), each dA (r, in), each dB (out, r)): the operator lora_adapters_backward.  Without weight dx is empty."""
    dy_rows, rows = as_rows(dy), as_rows(x)
    dx = torch.empty(0 if weight is None else x.shape, dtype=x.dtype, device=x.device)
    dx_rows = None if weight is None else as_rows(dx)
    B = torch.cat(list(lora_Bs), 1)
    if backend == "torch":
        dU, dB = cast(tuple[Tensor, Tensor], torch_backend.grad_s_and_b(dy_rows, B, U, 1.0, 0.0))
    else:
        from fastlora.kernels import group, several

        dU, dB = several.grad_u_and_b(dy_rows, B, U)
    if route is not None:
        dU.masked_fill_(~route, 0.0)
    ranks = [A.shape[0] for A in lora_As]
    dSs, dAs = dU.split(ranks, 1), {}
    for index, step in enumerate(passes_of(words, dropout_ps, lora_As)):
        some_As = pick(lora_As, step.members)
        r = padded_rank(some_As)
        A, _ = stack(some_As, [], r)
        padded = [F.pad(dS, (0, r - dS.shape[1])) for dS in pick(dSs, step.members)]
        if backend == "torch":
            made = list(masks[index]) if step.masks else [None]
            dS = torch.cat(padded, 1).mul_(keep_scale(step.dropout_p))
            dA = cast(Tensor, torch_backend.grad_a_and_term_of_dx(dS, rows, A, dx_rows, made, index > 0))
        else:
            dropout = seed if step.masks else None, step.words, step.dropout_p
            dA = group.grad_a_shared(rows, padded, A, *dropout, dx_rows, index > 0)
        for i, own in zip(step.members, dA.chunk(len(some_As)), strict=True):
            dAs[i] = own[: ranks[i]].to(A.dtype, copy=True)
    if dx_rows is not None and weight is not None:
        dx_rows.addmm_(dy_rows, weight)
    dBs = [own.to(part.dtype, copy=True).contiguous() for own, part in zip(dB.split(ranks, 1), lora_Bs, strict=True)]
    return dx, [dAs[i] for i in range(len(lora_As))], dBs


@torch.library.register_fake("fastlora::lora_adapters", lib=_LIBRARY)
def _forward_fake(x, weight, lora_As, lora_Bs, bias, route, seed, words, dropout_ps, backend):  # type: ignore[no-untyped-def]  # the schema types it
    M = math.prod(x.shape[:-1])  # Size.numel() specialises a symbolic size and recompiles for every length
    U = x.new_empty((M, sum(A.shape[0] for A in lora_As)), dtype=accumulator(x.dtype))
    masks = []
    for step in passes_of(words, dropout_ps, lora_As) if backend == "torch" else ():
        bits = (len(step.masks), M, -(-x.shape[-1] // LANES)) if step.masks and seed is not None else 0
        masks.append(x.new_empty(bits, dtype=torch.uint8))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), U, masks


@torch.library.register_fake("fastlora::lora_adapters_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight, lora_As, lora_Bs, U, route, masks, seed, words, dropout_ps, backend):  # type: ignore[no-untyped-def]  # the schema types it
    dx = x.new_empty(0 if weight is None else x.shape)
    return dx, [A.new_empty(A.shape) for A in lora_As], [B.new_empty(B.shape) for B in lora_Bs]


_LIBRARY.impl("lora_adapters", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_adapters_backward", backward, "CompositeExplicitAutograd")

LORA_ADAPTERS = torch.ops.fastlora.lora_adapters.default
LORA_ADAPTERS_BACKWARD = torch.ops.fastlora.lora_adapters_backward.default
