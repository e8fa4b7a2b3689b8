"""DoRA: a LoRA linear whose weight has rows of trained length (Liu et al., "Weight-decomposed low-rank adaptation", 2024).

    n = ‖W + scaling · B A‖ of each row     (out,)    float32; a constant to autograd, as in the paper and in PEFT
    f = magnitude / n                       (out,)
    z = drop(x) (W + scaling · B A)ᵀ        (M, out)  what the magnitude scales
    y = (x − drop(x)) Wᵀ + f ∘ z + bias     (M, out)

This is what PEFT computes: its dropout acts on the whole scaled term, and what it drops goes through W unscaled. Each output
feature scales x and drop(x) in its own proportion, so dropout costs one more product with W in each direction.

The norm never forms B A. A pass over W gives its cross term and another ‖W‖². Nothing of it is kept: a weight may change
without a trace, as under PEFT's merging, which adds to `.data`:

    n² = ‖W‖² + 2 · scaling · Σ_r B ∘ (W Aᵀ) + scaling² · Σ_r B ∘ (B (A Aᵀ))

Both directions run on the LoRA linear. Let u = x Wᵀ + bias + scaling · S Bᵀ be its output and c the dropout scale. Forward:

    without dropout    z = u without the bias                               y = f ∘ z + bias
    with dropout       z / c = mask(x) Wᵀ + scaling / c · S Bᵀ              y = u + c (f − 1) ∘ z / c

The magnitude moves into W and B for backward, so that dy stays as it is. Its rounding would be that of every gradient. LoRA's
backward with W' and B' = f ∘ B gives dA, dB' and

    without dropout    W' = f ∘ W    dx
    with dropout       W' = W        dx = LoRA's + mask(dy (c (f − 1) ∘ W))
    both               dB = f ∘ dB'      dmagnitude = Σ dy ∘ z over rows / n, summed in float32

Saved for backward beside what the LoRA linear saves: f and n, and z where the magnitude is trained. With dropout z has the
dtype of A, otherwise that of x; PEFT keeps two tensors of z's size. Transient: a copy of W in x's dtype.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora import ops, validation
from fastlora.autograd import refuse_second_derivative
from fastlora.boundary import cast, changing, settle, unpack
from fastlora.quantized import QuantizedWeight, Scheme, dequantize
from fastlora.rows import bias_grad
from fastlora.variants.dora_ops import DORA_LINEAR, DORA_LINEAR_BACKWARD, DORA_NORM


class DoraLinearFunction(torch.autograd.Function):
    """y of the module's docstring and its gradients, for inputs that `dora_linear` has checked.

    Args of `apply`: those of `LoraLinearFunction`, with the magnitude (out,) after bias.  Second derivatives are refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        magnitude: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        backend: str,
        scheme: Scheme | None,
        *statistics: Tensor,
    ) -> Tensor:
        dense = weight if scheme is None else dequantize(scheme, weight, statistics, x.dtype)
        need_dx, _, need_dA, need_dB, _, need_dmagnitude = ctx.needs_input_grad[:6]
        n = DORA_NORM(dense, lora_A, lora_B, scaling)
        factor = magnitude.to(n.dtype) / n
        y, S, mask, z = DORA_LINEAR(x, dense, lora_A, lora_B, bias, factor, seed, scaling, dropout_p, backend, need_dmagnitude)
        need_dS = need_dx or need_dA
        ctx.save_for_backward(
            x if need_dA else None,
            weight if need_dx else None,
            lora_A if need_dx else None,
            lora_B if need_dS else None,
            factor,
            n if need_dmagnitude else None,
            S if need_dB else None,
            (mask if ops.keeps_mask(seed, backend) else seed) if need_dS else None,
            z if need_dmagnitude else None,
            *(statistics if need_dx else ()),
        )
        ctx.dtypes = lora_A.dtype, magnitude.dtype, None if bias is None else bias.dtype
        ctx.constants = scaling, dropout_p, backend
        ctx.scheme, ctx.inputs = scheme, 11 + len(statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("dora_linear")
        need_dx, _, need_dA, need_dB, need_dbias, need_dmagnitude = ctx.needs_input_grad[:6]
        adapter_dtype, magnitude_dtype, bias_dtype = ctx.dtypes
        scaling, dropout_p, backend = ctx.constants
        x, weight, lora_A, lora_B, factor, n, S, mask, z, *statistics = ctx.saved_tensors
        if ctx.scheme is not None and need_dx:
            weight = dequantize(ctx.scheme, weight, statistics, dy.dtype, after=dy)
        dx, dA, dB, dfactor = DORA_LINEAR_BACKWARD(
            dy, x, weight, lora_A, lora_B, factor, S, mask, z, scaling, dropout_p, adapter_dtype, backend
        )
        dbias = bias_grad(dy, bias_dtype) if need_dbias else None
        dmagnitude = (dfactor / n).to(magnitude_dtype) if need_dmagnitude else None
        grads = (dx if need_dx else None), None, (dA if need_dA else None), (dB if need_dB else None), dbias, dmagnitude
        return *grads, *[None] * (ctx.inputs - len(grads))


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (x − drop(x)) Wᵀ + magnitude / n ∘ drop(x) (W + scaling · B A)ᵀ + bias, with gradients for all but W; W is frozen.

    Args:
        magnitude: (out,), of any floating dtype.  The others are those of `fastlora.lora_linear`, and so is the mask of a seed.

    Returns:
        (..., out) in x's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: see `fastlora.lora_linear`; or r = 0, or a magnitude of another shape or device.
    """
    validation.check_tensor(x, "x")
    autocast = validation.autocast_dtype(x.device)
    validation.check_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, autocast)
    validation.check_tensor(magnitude, "magnitude", 1)
    if magnitude.shape != (weight.shape[0],) or magnitude.device != x.device:
        expected = f"(out,) = ({weight.shape[0]},) on {x.device}"
        raise ValueError(f"magnitude must be {expected}, got {tuple(magnitude.shape)} on {magnitude.device}")
    if lora_A.shape[0] == 0:
        raise ValueError("lora_A has r=0, expected r >= 1: DoRA scales a weight with an adapter")
    backend, (dropout_p,), seed = settle("dora_linear", x, (dropout_p,), training, seed, backend, autocast)
    dense, scheme, statistics = unpack(weight, autocast)
    x, lora_A, lora_B = cast(x, autocast), cast(lora_A, autocast), cast(lora_B, autocast)
    bias = None if bias is None else bias.to(x.dtype)
    lora_B, scaling = changing(lora_B, scaling)
    arguments = x, dense, lora_A, lora_B, bias, magnitude, seed, float(scaling), dropout_p, backend
    return DoraLinearFunction.apply(*arguments, scheme, *statistics)
