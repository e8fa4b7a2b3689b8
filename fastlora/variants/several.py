"""`lora_adapters`: several adapters on one weight, all of them on every row of x, or one of them on each row.

    y = x Wᵀ + bias + Σᵢ scalingᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ            PEFT's set_adapter([a, b])
    yₘ = xₘ Wᵀ + bias + scalingᵢ · dropᵢ(xₘ) Aᵢᵀ Bᵢᵀ, i = owner[m]      PEFT's adapter_names, one for each row m

Both are one LoRA linear whose rank R is the sum of all. Let A (R, in) hold the Aᵢ below each other, B (out, R) the
scalingᵢ · Bᵢ side by side, and drop(x) Aᵀ take the mask of each Aᵢ. route (M, R) holds which columns are of row m's adapter:

    U  = route ∘ drop(x) Aᵀ     (M, R)    saved, float32; without an owner route is all true
    y  = x Wᵀ + bias + U Bᵀ     (M, out)  one product with W, however many adapters there are
    dU = route ∘ dy B           dB = dyᵀ U
    dA = dUᵀ drop(x)            dx = dy W + drop'(dU A)

So a row costs R where its own adapter would cost r: for 8 adapters of rank 16 at in = out = 4096, 6 % of the product with W.
Rows of different adapters meet in dA and dB as zeros: what is NaN or infinite in one adapter's rows reaches the others'
gradients.

A part is what shares a mask: adapters without dropout, and with an owner adapters of one rate, for a row meets only one of
them. Its mask is `dropout_mask(seed, M, in, p, projection=i)`, i the first of its adapters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import validation
from fastlora.autograd import refuse_second_derivative
from fastlora.blocks.projections import MAX_PROJECTIONS
from fastlora.boundary import cast, settle, unpack
from fastlora.dropout import threshold
from fastlora.ops import keeps_mask
from fastlora.quantized import QuantizedWeight, Scheme, dequantize
from fastlora.rows import bias_grad
from fastlora.variants.several_ops import LORA_ADAPTERS, LORA_ADAPTERS_BACKWARD


class Adapter(NamedTuple):
    """One adapter of a linear: A (r, in), B (out, r), and the magnitude (out,) if it is DoRA."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    magnitude: Tensor | None = None


class Constants(NamedTuple):
    """What the parts are besides their tensors."""

    words: tuple[int, ...]
    dropout_ps: tuple[float, ...]
    backend: str
    scheme: Scheme | None  # of a quantised weight


class LoraAdaptersFunction(torch.autograd.Function):
    """y of the module's docstring and its gradients, for inputs that `lora_adapters` has checked.

    Saved for backward: x, W where dx is needed, A, B, U, route, and the seed; on the backend "torch" one bit an element of x
    and mask. Second derivatives are refused.

    Args of `apply`: x (..., in), weight (out, in) or its packed tensor, bias or None, route bool (M, R) or None, seed int64
    (1,) or None, Constants, then A and B of the n parts, and the statistics of a quantised weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        route: Tensor | None,
        seed: Tensor | None,
        constants: Constants,
        *tensors: Tensor,
    ) -> Tensor:
        words, dropout_ps, backend, scheme = constants
        n = len(words)
        lora_As, lora_Bs, statistics = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dense = weight if scheme is None else dequantize(scheme, weight, statistics, x.dtype)
        y, U, masks = LORA_ADAPTERS(x, dense, lora_As, lora_Bs, bias, route, seed, words, dropout_ps, backend)
        kept = None if keeps_mask(seed, backend) else seed
        held = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, held, U, route, kept, *tensors, *masks)
        ctx.constants, ctx.inputs, ctx.bias_dtype = constants, len(tensors), None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lora_adapters")
        words, dropout_ps, backend, scheme = ctx.constants
        n, needs = len(words), ctx.needs_input_grad
        x, weight, U, route, seed, *saved = ctx.saved_tensors
        tensors, masks = saved[: ctx.inputs], saved[ctx.inputs :]
        lora_As, lora_Bs, statistics = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        grads: list[Tensor | None] = [None] * (6 + ctx.inputs)
        if needs[0] or any(needs[6 : 6 + 2 * n]):
            if scheme is not None and weight is not None:
                weight = dequantize(scheme, weight, statistics, x.dtype, after=dy)
            operands = x, weight, lora_As, lora_Bs, U, route, masks, seed, words, dropout_ps, backend
            dx, dAs, dBs = LORA_ADAPTERS_BACKWARD(dy, *operands)
            grads[0] = dx if needs[0] else None
            for at, grad in enumerate([*dAs, *dBs], start=6):
                grads[at] = grad if needs[at] else None
        if needs[2]:
            grads[2] = bias_grad(dy, ctx.bias_dtype)
        return tuple(grads)


def lora_adapters(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter],
    bias: Tensor | None = None,
    *,
    owner: Tensor | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + the terms of `adapters`, with gradients for x, bias and each A and B; W is frozen.

    Args:
        adapters: at least one and at most 256; ranks, scalings, rates and dtypes may differ.  A magnitude is refused.
        owner: int64 (M,) on x.device, the index in `adapters` of the one adapter of each row of x viewed as (M, in).  Any
            other value, such as -1, leaves the row to W and bias.  None: every row has all adapters.
        The others are those of `fastlora.lora_linear`.

    Returns:
        (..., out) in x's dtype.

    Raises:
        TypeError, ValueError: see `fastlora.lora_linear`; the message begins with the adapter.  No adapter, or too many.
        RuntimeError: see `fastlora.lora_linear`.
    """
    validation.check_tensor(x, "x")
    if not adapters or not all(isinstance(item, Adapter) for item in adapters):
        raise TypeError(
            f"adapters must be a sequence of at least one Adapter, got {[type(item).__name__ for item in adapters]}"
        )
    if len(adapters) > MAX_PROJECTIONS:
        raise ValueError(f"adapters must hold at most {MAX_PROJECTIONS} adapters, got {len(adapters)}")
    autocast = validation.autocast_dtype(x.device)
    for i, (lora_A, lora_B, scaling, dropout_p, magnitude) in enumerate(adapters):
        validation.check_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, autocast, name=f"adapters[{i}]")
        if magnitude is not None:
            use = "use fastlora.variants.dora.dora_linear"
            raise ValueError(f"adapters[{i}]: it has a magnitude, but DoRA scales the weight: {use}")
    if owner is not None:
        _check_owner(owner, x)
    dropout_ps = [adapter.dropout_p for adapter in adapters]
    backend, rates, seed = settle("lora_adapters", x, dropout_ps, training, seed, backend, autocast)
    parts: dict[Any, list[int]] = {}
    for i, (adapter, p) in enumerate(zip(adapters, rates, strict=True)):
        own_mask = i if p and owner is None else None
        parts.setdefault((threshold(p), adapter.lora_A.dtype, own_mask), []).append(i)
    members = list(parts.values())
    lora_As = [cast(torch.cat([adapters[i].lora_A for i in part]), autocast) for part in members]
    lora_Bs = [cast(torch.cat([adapters[i].lora_B * adapters[i].scaling for i in part], 1), autocast) for part in members]
    route = None
    if owner is not None:
        columns = [owner.new_full((adapters[i].lora_A.shape[0],), i) for part in members for i in part]
        route = owner.unsqueeze(1) == torch.cat(columns)
    x, (dense, scheme, statistics) = cast(x, autocast), unpack(weight, autocast)
    bias = None if bias is None else bias.to(x.dtype)
    constants = Constants(tuple(part[0] for part in members), tuple(rates[part[0]] for part in members), backend, scheme)
    return LoraAdaptersFunction.apply(x, dense, bias, route, seed, constants, *lora_As, *lora_Bs, *statistics)


def _check_owner(owner: Tensor, x: Tensor) -> None:
    rows = x.numel() // max(x.shape[-1], 1)
    if not isinstance(owner, Tensor) or owner.dtype != torch.int64:
        raise TypeError(
            f"owner must be an int64 tensor, got {owner.dtype if isinstance(owner, Tensor) else type(owner).__name__}"
        )
    if owner.shape != (rows,) or owner.device != x.device:
        expected = f"(M,) = ({rows},) on {x.device}"
        raise ValueError(f"owner must be {expected}, got {tuple(owner.shape)} on {owner.device}")
