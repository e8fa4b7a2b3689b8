"""The two operators of a gated MLP with LoRA, y = down(act(gate(x)) · up(x)): schemas, fakes, and what runs them.

gate and up share x as in `fastlora.blocks.group`.  Of the wide activations e = gate(x) and g = up(x) alone are kept;
h = act(e) · g is made again in backward.  As in `fastlora.ops` the operators are functional, and the backend "torch" keeps the
packed masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.blocks import group, torch_gated
from fastlora.blocks.group import pick
from fastlora.dropout import DOWN, GATE, LANES, UP, packed_mask, threshold
from fastlora.rows import accumulator, as_rows, bias_grad, without_autocast

ALL = (GATE, UP, DOWN)

_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define(
    "lora_mlp(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] biases, Tensor? seed, "
    "float[] scalings, float[] dropout_ps, str activation, str backend) "
    "-> (Tensor y, Tensor e, Tensor g, Tensor[] Ss, Tensor[] masks)"
)
_LIBRARY.define(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor e, Tensor g, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor[] Ss, Tensor[] masks, Tensor? seed, float[] scalings, float[] dropout_ps, str activation, bool[] trained_biases, "
    "str backend) -> (Tensor dx, Tensor[] dAs, Tensor[] dBs, Tensor[] dbiases)"
)


def _adapted(lora_As: Sequence[Tensor]) -> list[int]:
    """Which of gate and up have an adapter."""
    return [i for i in (GATE, UP) if lora_As[i].shape[0]]


def _adapter_of_down(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return (lora_As[DOWN], lora_Bs[DOWN]) if lora_As[DOWN].shape[0] else (None, None)


def _drops(lora_A: Tensor | None, seed: Tensor | None, dropout_p: float) -> bool:
    return lora_A is not None and seed is not None and threshold(dropout_p) > 0


@without_autocast
def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seed: Tensor | None,
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(y (..., out), e, g, S and packed masks of each pass over x, then those of down): the operator lora_mlp."""
    found = _adapted(lora_As)
    made: dict[int, Tensor] = {}
    Ss: list[Tensor] = []
    masks: list[Tensor] = []
    if found:
        operands: Any = (pick(items, found) for items in (weights, lora_As, lora_Bs, biases))
        facts: Any = seed, found, pick(scalings, found), pick(dropout_ps, found), backend
        ys, Ss, masks = group.forward(x, *operands, *facts)
        made = dict(zip(found, ys, strict=True))
    e, g = (made[i] if i in made else F.linear(x, weights[i], biases[i]) for i in (GATE, UP))
    A, B = _adapter_of_down(lora_As, lora_Bs)
    y = x.new_empty((*x.shape[:-1], weights[DOWN].shape[0]))
    own_seed = seed if _drops(A, seed, dropout_ps[DOWN]) else None
    wide, weight, bias, out = (as_rows(e), as_rows(g)), weights[DOWN], biases[DOWN], as_rows(y)
    scaling, p = scalings[DOWN], dropout_ps[DOWN]
    if backend == "torch":
        mask = None if own_seed is None else packed_mask(own_seed, wide[0].shape[0], wide[0].shape[1], p, DOWN)
        S = torch_gated.forward(*wide, weight, A, B, bias, mask, scaling, p, activation, out)
        masks = [*masks, x.new_empty(0, dtype=torch.uint8) if mask is None else mask]
    else:
        from fastlora import dispatch  # not at the top: see `ops._implementation`
        from fastlora.kernels import mlp_steps

        form: Any = {"choice": backend, "plan": dispatch.plan_y}
        S = mlp_steps.forward(*wide, weight, A, B, bias, own_seed, scaling, p, activation, out, **form)
    return y, e, g, [*Ss, S], masks


@without_autocast
def backward(
    dy: Tensor,
    x: Tensor,
    e: Tensor,
    g: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    masks: Sequence[Tensor],
    seed: Tensor | None,
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    activation: str,
    trained_biases: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(dx (..., in), dA and dB of each linear, empty where it has no adapter, dbias where trained): lora_mlp_backward.

    weights are all three, or down's alone: then dx is empty.
    """
    A, B = _adapter_of_down(lora_As, lora_Bs)
    operands = as_rows(dy), as_rows(e).contiguous(), as_rows(g).contiguous(), weights[-1], A, B, Ss[-1]
    constants = scalings[DOWN], dropout_ps[DOWN], activation
    if backend == "torch":
        de, dg, dA, dB = torch_gated.backward(*operands, masks[-1] if masks[-1].numel() else None, *constants)
    else:
        from fastlora.kernels import mlp_steps  # not at the top: see `ops._implementation`

        own_seed = seed if _drops(A, seed, dropout_ps[DOWN]) else None
        de, dg, dA, dB = mlp_steps.backward(*operands, own_seed, *constants)
    dAs, dBs = ([x.new_empty(0, dtype=t.dtype) for t in tensors] for tensors in (lora_As, lora_Bs))
    if dA is not None and dB is not None:
        dAs[DOWN], dBs[DOWN] = dA, dB
    dys, found, needs_dx = (de, dg), _adapted(lora_As), len(weights) == len(ALL)
    dx = x.new_empty(x.shape if needs_dx else 0)
    if found:
        picked_As, picked_Bs, picked_scalings, picked_ps = (
            pick(items, found) for items in (lora_As, lora_Bs, scalings, dropout_ps)
        )
        dense = pick(weights, found) if needs_dx else []
        facts: Any = Ss[:-1], masks[:-1], seed, found, picked_scalings, picked_ps, backend
        used, picked_dys = range(len(found)), pick(dys, found)
        dx, stacked, made_dBs = group.backward(picked_dys, used, x, dense, picked_As, picked_Bs, *facts)
        for step, part in zip(group.passes_of(found, picked_ps, picked_As), stacked, strict=True):
            for place, made in zip(step.members, part.chunk(len(step.members)), strict=True):
                dAs[found[place]] = made[: picked_As[place].shape[0]].clone()  # outputs of an operator share no memory
        for i, made in zip(found, made_dBs, strict=True):
            dBs[i] = made
    for i in (GATE, UP) if needs_dx else ():
        if i not in found:
            # Without an adapter on gate and up, gate's product is the first to be written to dx.
            torch.addmm(as_rows(dx), dys[i], weights[i], beta=int(bool(found) or i == UP), out=as_rows(dx))
    dbiases = [
        bias_grad(grad, x.dtype) if trained else x.new_empty(0)
        for grad, trained in zip((de, dg, dy), trained_biases, strict=True)
    ]
    return dx, dAs, dBs, dbiases


@torch.library.register_fake("fastlora::lora_mlp", lib=_LIBRARY)
def _forward_fake(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_ps, activation, backend):  # type: ignore[no-untyped-def]  # the schema types it
    found, Ss, masks = _adapted(lora_As), [], []
    if found:
        operands = (pick(items, found) for items in (weights, lora_As, lora_Bs, biases))
        _, Ss, masks = group._forward_fake(x, *operands, seed, found, pick(scalings, found), pick(dropout_ps, found), backend)
    y, e, g = (x.new_empty((*x.shape[:-1], weights[i].shape[0])) for i in (DOWN, GATE, UP))
    A, M = _adapter_of_down(lora_As, lora_Bs)[0], math.prod(x.shape[:-1])
    Ss = [*Ss, x.new_empty((M, lora_As[DOWN].shape[0]), dtype=accumulator(x.dtype))]
    if backend == "torch":
        bits = (M, -(-e.shape[-1] // LANES)) if _drops(A, seed, dropout_ps[DOWN]) else 0
        masks = [*masks, x.new_empty(bits, dtype=torch.uint8)]
    return y, e, g, Ss, masks


@torch.library.register_fake("fastlora::lora_mlp_backward", lib=_LIBRARY)
def _backward_fake(  # type: ignore[no-untyped-def]  # the schema types it
    dy, x, e, g, weights, lora_As, lora_Bs, Ss, masks, seed, scalings, dropout_ps, activation, trained_biases, backend
):
    def grads(tensors):  # type: ignore[no-untyped-def]  # lists of tensors
        return [t.new_empty(t.shape if A.shape[0] else 0) for t, A in zip(tensors, lora_As, strict=True)]

    widths = e.shape[-1], g.shape[-1], dy.shape[-1]
    dbiases = [x.new_empty(width if trained else 0) for width, trained in zip(widths, trained_biases, strict=True)]
    return x.new_empty(x.shape if len(weights) == len(ALL) else 0), grads(lora_As), grads(lora_Bs), dbiases


_LIBRARY.impl("lora_mlp", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_mlp_backward", backward, "CompositeExplicitAutograd")

LORA_MLP = torch.ops.fastlora.lora_mlp.default
LORA_MLP_BACKWARD = torch.ops.fastlora.lora_mlp_backward.default
