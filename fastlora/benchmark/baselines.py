"""What others do: the frozen linear alone, eager LoRA, PEFT's own layer, and chained addmm_.

The functions are called as call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p) -> y with x (M, K), weight (N, K),
lora_A (r, K), lora_B (N, r), and draw their masks from torch's default generator, as in training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frozen_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: float) -> Tensor:
    """y = x Wᵀ + bias: the floor."""
    return F.linear(x, weight, bias)


def eager_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """`peft.tuners.lora.layer.Linear.forward` in training mode: torch's dropout, two linears, one add, one cast."""
    base = F.linear(x, weight, bias)
    dropped = F.dropout(x.to(lora_A.dtype), dropout_p) if dropout_p > 0 else x.to(lora_A.dtype)
    return (base + F.linear(F.linear(dropped, lora_A), lora_B) * scaling).to(base.dtype)


def peft_layer(
    weight: Tensor, lora_A: nn.Parameter, lora_B: nn.Parameter, bias: Tensor | None, *, scaling: float, dropout_p: float
) -> nn.Module:
    """The `peft.tuners.lora.layer.Linear` on these very tensors, in training mode.

    Raises:
        ImportError: PEFT is not installed.
    """
    import peft

    with torch.device("meta"):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    base.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    r = lora_A.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout_p, target_modules=["linear"])
    layer: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": base})).linear
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora_A, lora_B
    layer.scaling["default"] = scaling
    return layer.train()


class _ChainedAddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p > 0 else (x, None)
        S = dropped @ lora_A.t()
        ctx.save_for_backward(dropped, mask, weight, lora_A, lora_B, S)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return F.linear(x, weight, bias).addmm_(S, lora_B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dropped, mask, weight, lora_A, lora_B, S = ctx.saved_tensors
        dS = (dy @ lora_B).mul_(ctx.scaling)
        dB = (dy.t() @ S).mul_(ctx.scaling)
        dA = dS.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dS, lora_A)
        else:
            scale = 1.0 / (1.0 - ctx.dropout_p) if ctx.dropout_p < 1.0 else 0.0
            dx.addcmul_(dS @ lora_A, mask, value=scale)
        return dx, None, dA, dB, None, None, None


def chained_addmm(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """y = x Wᵀ + bias, then y += scaling · S Bᵀ in place, and dx likewise: what Unsloth and Axolotl do.

    All tensors share one dtype.  Axolotl's way with dropout: the dropped x and the mask are kept for backward.
    """
    return _ChainedAddmm.apply(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
