"""`lora_mlp`: a gated MLP with LoRA on any of its linears, y = down(act(gate(x)) · up(x)), in one step.

gate and up share x as in `fastlora.group`.  Of the wide activations e = gate(x) and g = up(x) alone are saved; h = act(e) · g
is made again in backward.  As in `fastlora.ops` the operators are functional, and the backend "torch" keeps the packed masks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import group, torch_gated, validation
from fastlora.dropout import DOWN, GATE, LANES, UP, draw_seed, packed_mask, threshold
from fastlora.functional import _autocast_dtype, _choose_backend
from fastlora.group import _dense
from fastlora.ops import accumulator, as_rows, keeps_mask
from fastlora.projections import Projection, _cast
from fastlora.quantized import QuantizedWeight, Scheme

ACTIVATIONS = tuple(torch_gated.ACTIVATIONS)
NAMES = ("gate", "up", "down")

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


def _pick(indices: Sequence[int], *lists: Sequence[Any]) -> list[list[Any]]:
    return [[items[i] for i in indices] for items in lists]


def _adapter_of_down(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return (lora_As[DOWN], lora_Bs[DOWN]) if lora_As[DOWN].shape[0] else (None, None)


def _drops(lora_A: Tensor | None, seed: Tensor | None, dropout_p: float) -> bool:
    return lora_A is not None and seed is not None and threshold(dropout_p) > 0


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
    found, Ss, masks = _adapted(lora_As), [], []
    made: dict[int, Tensor] = {}
    if found:
        operands = _pick(found, weights, lora_As, lora_Bs, biases)
        ys, Ss, masks = group.forward(x, *operands, seed, found, *_pick(found, scalings, dropout_ps), backend)
        made = dict(zip(found, ys, strict=True))
    e, g = (made[i] if i in made else F.linear(x, weights[i], biases[i]) for i in (GATE, UP))
    A, B = _adapter_of_down(lora_As, lora_Bs)
    y = x.new_empty((*x.shape[:-1], weights[DOWN].shape[0]))
    rows, own_seed = (as_rows(e), as_rows(g)), seed if _drops(A, seed, dropout_ps[DOWN]) else None
    operands_of_down = weights[DOWN], A, B, biases[DOWN]
    constants = scalings[DOWN], dropout_ps[DOWN], activation, as_rows(y)
    if backend == "torch":
        mask = None if own_seed is None else packed_mask(own_seed, *rows[0].shape, dropout_ps[DOWN], DOWN)
        S = torch_gated.forward(*rows, *operands_of_down, mask, *constants)
        masks = [*masks, x.new_empty(0, dtype=torch.uint8) if mask is None else mask]
    else:
        from fastlora import dispatch  # not at the top: see `ops._implementation`
        from fastlora.kernels import mlp_steps

        S = mlp_steps.forward(*rows, *operands_of_down, own_seed, *constants, choice=backend, plan=dispatch.plan_y)
    return y, e, g, [*Ss, S], masks


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
    dys, found, needs_dx = (de, dg), _adapted(lora_As), len(weights) == len(NAMES)
    dx = x.new_empty(x.shape if needs_dx else 0)
    if found:
        picked_As, picked_Bs, picked_scalings, picked_ps = _pick(found, lora_As, lora_Bs, scalings, dropout_ps)
        dense = _pick(found, weights)[0] if needs_dx else []
        facts = Ss[:-1], masks[:-1], seed, found, picked_scalings, picked_ps, backend
        used = range(len(found))
        dx, stacked, made_dBs = group.backward(*_pick(found, dys), used, x, dense, picked_As, picked_Bs, *facts)
        for step, part in zip(group._passes(found, picked_ps, picked_As), stacked, strict=True):
            for place, made in zip(step.members, part.chunk(len(step.members)), strict=True):
                dAs[found[place]] = made[: picked_As[place].shape[0]].clone()  # outputs of an operator share no memory
        for i, made in zip(found, made_dBs, strict=True):
            dBs[i] = made
    for i in (GATE, UP) if needs_dx else ():
        if i not in found:
            # Without an adapter on gate and up, gate's product is the first to be written to dx.
            torch.addmm(as_rows(dx), dys[i], weights[i], beta=int(bool(found) or i == UP), out=as_rows(dx))
    dbiases = [
        rows.sum(0, dtype=accumulator(x.dtype)).to(x.dtype) if trained else x.new_empty(0)
        for rows, trained in zip((de, dg, as_rows(dy)), trained_biases, strict=True)
    ]
    return dx, dAs, dBs, dbiases


@torch.library.register_fake("fastlora::lora_mlp", lib=_LIBRARY)
def _forward_fake(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_ps, activation, backend):  # type: ignore[no-untyped-def]  # the schema types it
    found, Ss, masks = _adapted(lora_As), [], []
    if found:
        operands = _pick(found, weights, lora_As, lora_Bs, biases)
        _, Ss, masks = group._forward_fake(x, *operands, seed, found, *_pick(found, scalings, dropout_ps), backend)
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
    return x.new_empty(x.shape if len(weights) == len(NAMES) else 0), grads(lora_As), grads(lora_Bs), dbiases


_LIBRARY.impl("lora_mlp", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_mlp_backward", backward, "CompositeExplicitAutograd")

LORA_MLP = torch.ops.fastlora.lora_mlp.default
LORA_MLP_BACKWARD = torch.ops.fastlora.lora_mlp_backward.default


class Constants(NamedTuple):
    """What a gated MLP is besides its tensors.  The last two are as in `group.Constants`."""

    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    activation: str
    backend: str
    schemes: tuple[Scheme | None, ...]
    statistics: tuple[int, ...]


class LoraMlpFunction(torch.autograd.Function):
    """y = down(act(gate(x)) · up(x)) and its gradients, for inputs that `lora_mlp` has checked.

    Each linear is as in `LoraLinearFunction`, gate, up and down with dropout mask 0, 1 and 2 of the seed.  With h = act(e) · g:

        dh = dy W_down + c · mask₂(dS_down A_down)     (M, intermediate)
        dg = dh · act(e),  de = dh · g · act'(e)       (M, intermediate)
        dx = dx_gate(de) + dx_up(dg)                   (..., in), one tensor

    Saved for backward: x, e = gate(x), g = up(x), W, A and B of the three, the S of each, and the seed; on the backend "torch"
    one bit an element and mask.  None of them is written.  Second derivatives are refused.

    Args of `apply`: x (..., in), seed int64 (1,) or None, Constants, then the weights, lora_A, lora_B and biases or None of
    gate, up and down, and the statistics of the quantised weights.  A linear without an adapter has lora_A (0, in).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, constants: Constants, *tensors: Any) -> Tensor:
        weights, lora_As, lora_Bs, biases = (tensors[i : i + 3] for i in range(0, 12, 3))
        statistics = tensors[12:]
        dense = _dense(constants, weights, statistics, range(3), x.dtype)
        y, e, g, Ss, masks = LORA_MLP(x, dense, lora_As, lora_Bs, biases, seed, *constants[:4])
        kept_seed = None if keeps_mask(seed, constants.backend) else seed
        ctx.save_for_backward(x, kept_seed, e, g, *weights, *lora_As, *lora_Bs, *statistics, *Ss, *masks)
        ctx.passes, ctx.inputs = len(Ss), 3 + len(tensors)
        ctx.constants, ctx.bias_dtypes = constants, [None if bias is None else bias.dtype for bias in biases]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable alone would let a second derivative that reaches x, A or B but not dy come out as a silent zero.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("lora_mlp has no second derivative: its backward was called with create_graph=True")
        constants, needs = ctx.constants, ctx.needs_input_grad[3:]
        x, seed, e, g, *saved = ctx.saved_tensors
        weights, lora_As, lora_Bs = (saved[i : i + 3] for i in range(0, 9, 3))
        made = 9 + sum(constants.statistics)
        Ss, masks = saved[made : made + ctx.passes], saved[made + ctx.passes :]
        used = range(3) if ctx.needs_input_grad[0] else (DOWN,)
        dense = _dense(constants, weights, saved[9:made], used, x.dtype, [dy] * len(used))
        dx, *grads = LORA_MLP_BACKWARD(
            dy, x, e, g, dense, lora_As, lora_Bs, Ss, masks, seed, *constants[:3], needs[9:12], constants.backend
        )
        wanted = [
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(itertools.chain(*grads), needs[3:12], strict=True)),
        ]
        return (dx if ctx.needs_input_grad[0] else None), None, None, *wanted, *[None] * sum(constants.statistics)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = down(act(gate(x)) · up(x)), where each linear is that of `lora_linear`, with gradients as of it.

    Args:
        x: (..., in), any strides.
        gate, up: `Projection`s in -> intermediate.  down: one of intermediate -> out.  See `lora_linear` for their fields.  A
            linear without an adapter has lora_A = lora_B = None.
        activation: "silu", "gelu" (by erf) or "gelu_pytorch_tanh", the names of transformers.
        training: False turns dropout off.
        seed: one for all masks, as in `lora_linear`: `dropout_mask(seed, M, width, p, projection=i)` with i = 0 for gate, 1
            for up and 2 for down.
        backend: as in `lora_linear`.  "fused" is the form of forward's products; backward's are cuBLAS's in both forms.

    act(e) · g is computed in float32 and rounded once; eager torch rounds act(e) too.

    Returns:
        (..., out) in x's dtype.

    Raises:
        TypeError, ValueError: see `lora_linear`; the message begins with the linear.  Widths that do not fit together, or an
            activation that is not listed.
        RuntimeError: see `lora_linear`.
    """
    validation.check_tensor(x, "x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    linears, h, autocast_dtype = [], x, _autocast_dtype(x.device)
    for name, projection in zip(NAMES, (gate, up, down), strict=True):
        if name == "down":
            h = x.new_empty((0, linears[GATE].weight.shape[0]))
        linears.append(_checked(name, h, projection, autocast_dtype))
    if (widths := [linear.weight.shape[0] for linear in linears])[GATE] != widths[UP]:
        raise ValueError(f"gate and up must have one out_features, got {widths[GATE]} and {widths[UP]}")
    validation.check_seed(seed, x.device)
    dtype = validation.autocast_target(x, autocast_dtype)
    backend = _choose_backend(backend, x.device, dtype)
    if validation.is_transformed():
        raise RuntimeError("lora_mlp does not support functorch transforms (torch.func.grad, vmap, jvp, ...)")
    rates = tuple(float(item.dropout_p) if training and threshold(item.dropout_p) else 0.0 for item in linears)
    if not any(rates):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)  # without a copy from the host
    packed = [item.weight if isinstance(item.weight, QuantizedWeight) else None for item in linears]
    weights = [
        _cast(item.weight, autocast_dtype) if own is None else own.packed for item, own in zip(linears, packed, strict=True)
    ]
    lora_As, lora_Bs = ([_cast(item[i], autocast_dtype) for item in linears] for i in (1, 2))
    biases = [None if item.bias is None else item.bias.to(dtype) for item in linears]
    statistics = [() if own is None else own.statistics for own in packed]
    schemes = tuple(None if own is None else own.scheme for own in packed)
    scalings = tuple(float(item.scaling) for item in linears)
    constants = Constants(scalings, rates, activation, backend, schemes, tuple(map(len, statistics)))
    tensors = *weights, *lora_As, *lora_Bs, *biases, *(tensor for own in statistics for tensor in own)
    return LoraMlpFunction.apply(_cast(x, autocast_dtype), seed, constants, *tensors)


def _checked(name: str, x: Tensor, projection: Projection, autocast_dtype: torch.dtype | None) -> Projection:
    """The projection, with adapters of rank 0 in place of None, after the checks of `lora_linear`."""
    if not isinstance(projection, Projection):
        raise TypeError(f"{name} must be a Projection, got {type(projection).__name__}")
    weight, lora_A, lora_B = projection[:3]
    try:
        if lora_A is None and lora_B is None and isinstance(weight, (Tensor, QuantizedWeight)):
            out_features, in_features = weight.shape
            projection = projection._replace(lora_A=x.new_empty((0, in_features)), lora_B=x.new_empty((out_features, 0)))
        validation.check_inputs(x, *projection[:4], autocast_dtype)
        validation.check_number(projection.scaling, "scaling")
        validation.check_dropout_p(projection.dropout_p, "dropout_p")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return projection
