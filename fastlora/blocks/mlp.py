"""`lora_mlp`: a gated MLP with LoRA on any of its linears, y = down(act(gate(x)) · up(x)), in one step."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastlora import validation
from fastlora.autograd import refuse_second_derivative
from fastlora.blocks import torch_gated
from fastlora.blocks.group import Constants, dense_weights
from fastlora.blocks.mlp_ops import LORA_MLP, LORA_MLP_BACKWARD
from fastlora.blocks.projections import Projection, flatten
from fastlora.boundary import cast, settle
from fastlora.dropout import DOWN, GATE, UP
from fastlora.ops import keeps_mask
from fastlora.quantized import QuantizedWeight

ACTIVATIONS = tuple(torch_gated.ACTIVATIONS)
NAMES = ("gate", "up", "down")


class LoraMlpFunction(torch.autograd.Function):
    """y = down(act(gate(x)) · up(x)) and its gradients, for inputs that `lora_mlp` has checked.

    Each linear is as in `LoraLinearFunction`, gate, up and down with dropout mask 0, 1 and 2 of the seed.  With h = act(e) · g:

        dh = dy W_down + c · mask₂(dS_down A_down)     (M, intermediate)
        dg = dh · act(e),  de = dh · g · act'(e)       (M, intermediate)
        dx = dx_gate(de) + dx_up(dg)                   (..., in), one tensor

    Saved for backward: x, e = gate(x), g = up(x), W, A and B of the three, the S of each, and the seed; on the backend "torch"
    one bit an element and mask.  Backward writes to none of them.  Second derivatives are refused.

    Args of `apply`: x (..., in), seed int64 (1,) or None, activation, Constants, then the weights, lora_A, lora_B and biases or
    None of gate, up and down, and the statistics of the quantised weights.  A linear without an adapter has lora_A (0, in).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, activation: str, constants: Constants, *tensors: Any) -> Tensor:
        weights, lora_As, lora_Bs, biases = (tensors[i : i + 3] for i in range(0, 12, 3))
        statistics = tensors[12:]
        dense = dense_weights(constants, weights, statistics, range(3), x.dtype)
        y, e, g, Ss, masks = LORA_MLP(x, dense, lora_As, lora_Bs, biases, seed, *constants[1:3], activation, constants.backend)
        kept_seed = None if keeps_mask(seed, constants.backend) else seed
        ctx.save_for_backward(x, kept_seed, e, g, *weights, *lora_As, *lora_Bs, *statistics, *Ss, *masks)
        ctx.passes, ctx.activation, ctx.constants = len(Ss), activation, constants
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lora_mlp")
        constants, needs = ctx.constants, ctx.needs_input_grad[4:]
        x, seed, e, g, *saved = ctx.saved_tensors
        weights, lora_As, lora_Bs = (saved[i : i + 3] for i in range(0, 9, 3))
        made = 9 + sum(constants.statistics)
        Ss, masks = saved[made : made + ctx.passes], saved[made + ctx.passes :]
        used = range(3) if ctx.needs_input_grad[0] else (DOWN,)
        dense = dense_weights(constants, weights, saved[9:made], used, x.dtype, [dy] * len(used))
        constants_of_backward = *constants[1:3], ctx.activation, needs[9:12], constants.backend
        dx, *grads = LORA_MLP_BACKWARD(dy, x, e, g, dense, lora_As, lora_Bs, Ss, masks, seed, *constants_of_backward)
        wanted = [
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(itertools.chain(*grads), needs[3:12], strict=True)),
        ]
        return (dx if ctx.needs_input_grad[0] else None), None, None, None, *wanted, *[None] * sum(constants.statistics)


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
    linears: list[Projection] = []
    h, autocast = x, validation.autocast_dtype(x.device)
    for name, projection in zip(NAMES, (gate, up, down), strict=True):
        if name == "down":
            h = torch.zeros((0, linears[GATE].weight.shape[0]), dtype=x.dtype, device=x.device)
        linears.append(_checked(name, h, projection, autocast))
    if (widths := [linear.weight.shape[0] for linear in linears])[GATE] != widths[UP]:
        raise ValueError(f"gate and up must have one out_features, got {widths[GATE]} and {widths[UP]}")
    setting = settle("lora_mlp", x, [item.dropout_p for item in linears], training, seed, backend, autocast)
    x = cast(x, autocast)
    tensors = flatten(linears, (GATE, UP, DOWN), setting, x.dtype, autocast)
    return LoraMlpFunction.apply(x, setting.seed, activation, *tensors)


def _checked(name: str, x: Tensor, projection: Projection, autocast: torch.dtype | None) -> Projection:
    """The projection, with adapters of rank 0 in place of None, after the checks of `lora_linear`."""
    if not isinstance(projection, Projection):
        raise TypeError(f"{name} must be a Projection, got {type(projection).__name__}")
    weight, lora_A, lora_B, bias, *_ = projection
    if (lora_A is None) != (lora_B is None):
        raise TypeError(f"{name}: lora_A and lora_B must both be tensors or both None, got {type(lora_A)} and {type(lora_B)}")
    if name == "down" and len(weight.shape) == 2 and weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"down: gate has {x.shape[1]} out_features, but down's weight {tuple(weight.shape)} expects {weight.shape[1]}"
        )
    if lora_A is None and lora_B is None and isinstance(weight, (Tensor, QuantizedWeight)) and len(weight.shape) == 2:
        lora_A, lora_B = (x.new_zeros(size) for size in ((0, weight.shape[1]), (weight.shape[0], 0)))
    validation.check_call(x, weight, lora_A, lora_B, bias, *projection[4:], autocast, name=name)
    return projection._replace(lora_A=lora_A, lora_B=lora_B)
