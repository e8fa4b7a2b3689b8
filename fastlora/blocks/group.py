"""The autograd Function and the two operators of projections that share x.

One pass over x serves the projections with one rate of dropout and one dtype of adapters, at most MASKS_AT_ONCE of them.  Their
A stand below each other, padded with zeros to the largest rank of the pass, and their S are (projections, M, rank).

As in `fastlora.ops` the operators are functional, and the backend "torch" keeps the packed masks for backward.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import torch_backend
from fastlora.autograd import refuse_second_derivative
from fastlora.dropout import LANES, packed_mask, threshold
from fastlora.ops import keeps_mask
from fastlora.quantized import Scheme, dequantize
from fastlora.rows import accumulator, as_rows, bias_grad

MASKS_AT_ONCE = 4  # of one launch: each has its accumulators in registers. Layers that share x are as many at the most

_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define(
    "lora_linears(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] biases, Tensor? seed, "
    "int[] words, float[] scalings, float[] dropout_ps, str backend) -> (Tensor[] ys, Tensor[] Ss, Tensor[] masks)"
)
_LIBRARY.define(
    "lora_linears_backward(Tensor[] dys, int[] used, Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor[] Ss, Tensor[] masks, Tensor? seed, int[] words, float[] scalings, float[] dropout_ps, str backend) "
    "-> (Tensor dx, Tensor[] dAs, Tensor[] dBs)"
)


class Pass(NamedTuple):
    """Projections that one pass over x serves: their indices, the words of their masks, and their rate."""

    members: tuple[int, ...]
    words: tuple[int, ...]
    dropout_p: float

    @property
    def masks(self) -> tuple[int, ...]:
        """The words of the masks to make: none without dropout, one where all projections share it."""
        return tuple(dict.fromkeys(self.words)) if threshold(self.dropout_p) else ()

    def packed(self, seed: Tensor | None, x: Tensor) -> list[Tensor]:
        """The packed masks of x (M, in), one of each of `masks`."""
        return [] if seed is None else [packed_mask(seed, x.shape[0], x.shape[1], self.dropout_p, word) for word in self.masks]

    def only(self, used: Sequence[int]) -> "Pass":
        """The pass for those of its projections that are in `used`."""
        kept = [(i, word) for i, word in zip(self.members, self.words, strict=True) if i in used]
        return self._replace(members=tuple(i for i, _ in kept), words=tuple(word for _, word in kept))


@functools.lru_cache(maxsize=4096)
def passes(words: tuple[int, ...], dropout_ps: tuple[float, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[Pass, ...]:
    """The passes over x of projections with these words of masks, rates and dtypes of adapters."""
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, (p, dtype) in enumerate(zip(dropout_ps, dtypes, strict=True)):
        alike.setdefault((threshold(p), dtype), []).append(index)
    found = []
    for indices in alike.values():
        for first in range(0, len(indices), MASKS_AT_ONCE):
            members = tuple(indices[first : first + MASKS_AT_ONCE])
            p = dropout_ps[members[0]]
            found.append(Pass(members, tuple(words[i] if threshold(p) else 0 for i in members), p))
    return tuple(found)


def passes_of(words: Sequence[int], dropout_ps: Sequence[float], lora_As: Sequence[Tensor]) -> tuple[Pass, ...]:
    """The passes over x that serve projections with these words, rates and factors, see `passes`."""
    find = passes.__wrapped__ if torch.compiler.is_compiling() else passes  # Dynamo warns of a cache that it traces through
    return find(tuple(words), tuple(dropout_ps), tuple(A.dtype for A in lora_As))


def stack(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], r: int) -> tuple[Tensor, list[Tensor]]:
    """(A (n · r, in), each B (out, r)), padded with zeros to rank r."""
    As = [A if A.shape[0] == r else F.pad(A, (0, 0, 0, r - A.shape[0])) for A in lora_As]
    Bs = [B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for B in lora_Bs]
    return As[0] if len(As) == 1 else torch.cat(As), Bs


def padded_rank(lora_As: Sequence[Tensor]) -> int:
    """The rank that the projections of a pass are padded to, at least 1: kernels take no empty A."""
    return max(1, *(A.shape[0] for A in lora_As))


def pick(tensors: Any, indices: Sequence[int]) -> list[Any]:
    """The elements of `tensors` at `indices`, in their order."""
    return [tensors[i] for i in indices]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seed: Tensor | None,
    words: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(y (..., out) of each projection, S (n, M, r) and packed masks of each pass): the operator lora_linears."""
    rows, Ss, masks = as_rows(x), [], []
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    outs = [as_rows(y) for y in ys]
    for step in passes_of(words, dropout_ps, lora_As):
        some = functools.partial(pick, indices=step.members)
        A, Bs = stack(some(lora_As), some(lora_Bs), padded_rank(some(lora_As)))
        operands = rows, some(weights), A, Bs, some(biases)
        constants = some(scalings), step.dropout_p, some(outs)
        if backend == "torch":
            made = step.packed(seed, rows)
            Ss.append(torch_backend.forward_shared(*operands, made or [None], *constants))
            masks.append(torch.stack(made) if made else x.new_empty(0, dtype=torch.uint8))
        else:
            from fastlora import dispatch  # not at the top: see `ops._implementation`
            from fastlora.kernels import group

            facts: Any = {"choice": backend, "plan": dispatch.plan_y}
            Ss.append(group.forward_shared(*operands, seed if step.masks else None, step.words, *constants, **facts))
    return ys, Ss, masks


def backward(
    dys: Sequence[Tensor],
    used: Sequence[int],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    masks: Sequence[Tensor],
    seed: Tensor | None,
    words: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx (..., in), dA (n · r, in) of each pass, dB (out, r) of each used projection): the operator lora_linears_backward.

    dys and weights are those of the projections in `used`.  Without weights dx is empty, and so is dA of a pass without them.
    """
    rows, grads = as_rows(x), {i: as_rows(dy) for i, dy in zip(used, dys, strict=True)}
    dx = torch.empty(x.shape if weights else 0, dtype=x.dtype, device=x.device)
    dx_rows = as_rows(dx) if weights else None
    dAs, dBs, written = [], {}, False
    for index, whole in enumerate(passes_of(words, dropout_ps, lora_As)):
        step = whole.only(used)
        if not step.members:
            dAs.append(x.new_empty(0))
            continue
        S, some = Ss[index], functools.partial(pick, indices=step.members)
        A, Bs = stack(some(lora_As), some(lora_Bs), S.shape[-1])
        places = [whole.members.index(i) for i in step.members]
        operands = rows, pick(grads, step.members), A, Bs, pick(S, places)
        constants = some(scalings), step.dropout_p, dx_rows, written
        if backend == "torch":
            made = pick(masks[index], places) if len(whole.masks) > 1 else list(masks[index]) if whole.masks else [None]
            dA, made_dBs = torch_backend.backward_shared(*operands, made, *constants)
        else:
            from fastlora.kernels import group  # not at the top: see `ops._implementation`

            dA, made_dBs = group.backward_shared(*operands, seed if step.masks else None, step.words, *constants)
        written = True
        dAs.append(dA)
        for i, dB in zip(step.members, made_dBs, strict=True):
            dBs[i] = dB[:, : lora_Bs[i].shape[1]].contiguous()
    for i, weight in zip(used, weights, strict=False):
        as_rows(dx).addmm_(grads[i], weight)
    return dx, dAs, [dBs[i] for i in used]


@torch.library.register_fake("fastlora::lora_linears", lib=_LIBRARY)
def _forward_fake(x, weights, lora_As, lora_Bs, biases, seed, words, scalings, dropout_ps, backend):  # type: ignore[no-untyped-def]  # the schema types it
    M = math.prod(x.shape[:-1])  # Size.numel() specialises a symbolic size and recompiles for every length
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    Ss, masks = [], []
    for step in passes_of(words, dropout_ps, lora_As):
        r = padded_rank(pick(lora_As, step.members))
        Ss.append(x.new_empty((len(step.members), M, r), dtype=accumulator(x.dtype)))
        if backend == "torch":
            bits = (len(step.masks), M, -(-x.shape[-1] // LANES)) if step.masks else 0
            masks.append(x.new_empty(bits, dtype=torch.uint8))
    return ys, Ss, masks


@torch.library.register_fake("fastlora::lora_linears_backward", lib=_LIBRARY)
def _backward_fake(dys, used, x, weights, lora_As, lora_Bs, Ss, masks, seed, words, scalings, dropout_ps, backend):  # type: ignore[no-untyped-def]  # the schema types it
    dx = x.new_empty(x.shape) if weights else x.new_empty(0)
    dAs = []
    for S, whole in zip(Ss, passes_of(words, dropout_ps, lora_As), strict=True):
        n = len(whole.only(used).members)
        shape = (n * S.shape[-1], x.shape[-1]) if n else 0
        dAs.append(x.new_empty(shape, dtype=lora_As[whole.members[0]].dtype if n else x.dtype))
    return dx, dAs, [torch.empty_like(lora_Bs[i], memory_format=torch.contiguous_format) for i in used]


_LIBRARY.impl("lora_linears", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linears_backward", backward, "CompositeExplicitAutograd")

LORA_LINEARS = torch.ops.fastlora.lora_linears.default
LORA_LINEARS_BACKWARD = torch.ops.fastlora.lora_linears_backward.default


class Constants(NamedTuple):
    """What a group is besides its tensors."""

    words: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    backend: str
    schemes: tuple[Scheme | None, ...]  # of weights that are quantised
    statistics: tuple[int, ...]  # how many tensors belong to each scheme


class LoraLinearsFunction(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + biasᵢ + scalingᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ of n projections that share x, and the gradients.

    Each projection is as in `LoraLinearFunction`, with dropout mask number wordsᵢ of the seed, and dx = Σ dxᵢ is one tensor.
    Saved for backward: x once, W, A, B, the S of all, and the seed; on the backend "torch" one bit an element and mask.  A
    projection whose y nobody used takes no part in backward.

    Args of `apply`: x (..., in), seed int64 (1,) or None, Constants, then n weights, n lora_A, n lora_B, n biases or None, and
    the statistics of the quantised weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, constants: Constants, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        n = len(constants.words)
        weights, lora_As, lora_Bs, biases = (tensors[i * n : i * n + n] for i in range(4))
        statistics = tensors[4 * n :]
        dense = dense_weights(constants, weights, statistics, range(n), x.dtype)
        facts = constants[:4]
        ys, Ss, masks = LORA_LINEARS(x, dense, lora_As, lora_Bs, biases, seed, *facts)
        ctx.save_for_backward(
            x, None if keeps_mask(seed, constants.backend) else seed, *weights, *lora_As, *lora_Bs, *statistics, *Ss, *masks
        )
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.constants, ctx.inputs = constants, 3 + len(tensors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lora_linears")
        constants, n = ctx.constants, len(ctx.constants.words)
        x, seed, *saved = ctx.saved_tensors
        weights, lora_As, lora_Bs = (saved[i * n : i * n + n] for i in range(3))
        statistics, made = saved[3 * n : 3 * n + sum(constants.statistics)], saved[3 * n + sum(constants.statistics) :]
        steps = passes_of(constants.words, constants.dropout_ps, lora_As)
        Ss, masks = made[: len(steps)], made[len(steps) :]
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        given = {i: dy for i, dy in enumerate(dys) if dy is not None}
        used = list(given)
        grads: list[Tensor | None] = [None] * ctx.inputs
        if used and (needs_dx or any(needs[n : 3 * n])):
            dense = dense_weights(constants, weights, statistics, used, x.dtype, [*given.values()]) if needs_dx else []
            dx, dAs, dBs = LORA_LINEARS_BACKWARD(
                [*given.values()], used, x, dense, lora_As, lora_Bs, Ss, masks, seed, *constants[:4]
            )
            grads[0] = dx if needs_dx else None
            for step, dA in zip(steps, dAs, strict=True):
                for i, part in zip((members := step.only(used).members), dA.chunk(max(len(members), 1)), strict=False):
                    grads[3 + n + i] = part[: lora_As[i].shape[0]] if needs[n + i] else None
            for i, dB in zip(used, dBs, strict=True):
                grads[3 + 2 * n + i] = dB if needs[2 * n + i] else None
        for i, dy in given.items():
            if needs[3 * n + i]:
                grads[3 + 3 * n + i] = bias_grad(dy, ctx.bias_dtypes[i])
        return tuple(grads)


def dense_weights(
    constants: Constants,
    weights: Sequence[Tensor],
    statistics: Sequence[Tensor],
    used: Sequence[int],
    dtype: torch.dtype,
    after: Sequence[Any] | None = None,
) -> list[Tensor]:
    """The dense weights of the projections in `used`; all are there at once while the operator runs."""
    dense = []
    for place, i in enumerate(used):
        first, scheme = sum(constants.statistics[:i]), constants.schemes[i]
        own = statistics[first : first + constants.statistics[i]]
        behind = None if after is None else after[place]
        dense.append(weights[i] if scheme is None else dequantize(scheme, weights[i], own, dtype, after=behind))
    return dense
