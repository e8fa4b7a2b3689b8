"""The autograd Function: which tensors backward needs, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora.quantized import Scheme, dequantize
from fastlora.rows import bias_grad


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError in a backward that is itself differentiated.

    once_differentiable alone would let a second derivative that reaches x, A or B but not dy come out as a silent zero.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative: its backward was called with create_graph=True; "
            "use fastlora.reference.lora_linear where one is needed, or fastlora.decelerate(model) for a PEFT model"
        )


class LoraLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ and its gradients, for inputs that `lora_linear` has checked.

    With dy = ∂L/∂y, c the dropout scale and mask the keep mask (no mask and c = 1 where seed is None):

        S  = c · mask(x) Aᵀ            (M, r)   saved, float32
        dS = scaling · dy B            (M, r)
        dB = scaling · dyᵀ S           (out, r)
        dA = c · dSᵀ mask(x)           (r, in)
        dx = dy W + c · mask(dS A)     (..., in)
        dbias = Σ dy over rows         (out,)

    Saved for backward: x where dA is needed, W and A where dx is, B where dx or dA is, S where dB is, and for the mask the
    8-byte seed, or on the backend "torch" one bit an element of x; no dropped copy of x.  A quantised W is made dense for the
    one product of forward and, again, for that of backward; it is saved packed.  Second derivatives are refused.

    Args of `apply`: x (..., in), weight (out, in), lora_A (r, in), lora_B (out, r), bias (out,) or None, seed int64 (1,) or
    None for no dropout, scaling, dropout_p, backend as in `lora_linear` but chosen, scheme None.  For a quantised W, weight is
    its packed tensor, and its scheme and statistics come last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        backend: str,
        scheme: Scheme | None,
        *statistics: Tensor,
    ) -> Tensor:
        dense = weight if scheme is None else dequantize(scheme, weight, statistics, x.dtype)
        y, S, mask = ops.LORA_LINEAR(x, dense, lora_A, lora_B, bias, seed, scaling, dropout_p, backend)
        need_dx, _, need_dA, need_dB, _ = ctx.needs_input_grad[:5]
        need_dS = need_dx or need_dA
        ctx.save_for_backward(
            x if need_dA else None,
            weight if need_dx else None,
            lora_A if need_dx else None,
            lora_B if need_dS else None,
            S if need_dB else None,
            (mask if ops.keeps_mask(seed, backend) else seed) if need_dS else None,
            *(statistics if need_dx else ()),
        )
        ctx.adapter_dtype = lora_A.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.constants = scaling, dropout_p, backend
        ctx.scheme, ctx.inputs = scheme, 10 + len(statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lora_linear")
        need_dx, _, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:5]
        dx = dA = dB = dbias = None
        if need_dx or need_dA or need_dB:
            scaling, dropout_p, backend = ctx.constants
            x, weight, lora_A, lora_B, S, mask, *statistics = ctx.saved_tensors
            if ctx.scheme is not None and need_dx:
                weight = dequantize(ctx.scheme, weight, statistics, dy.dtype, after=dy)
            dx, dA, dB = ops.LORA_LINEAR_BACKWARD(
                dy, x, weight, lora_A, lora_B, S, mask, scaling, dropout_p, ctx.adapter_dtype, backend
            )
        if need_dbias:
            dbias = bias_grad(dy, ctx.bias_dtype)
        grads = (dx if need_dx else None), None, (dA if need_dA else None), (dB if need_dB else None), dbias
        return *grads, *[None] * (ctx.inputs - len(grads))
