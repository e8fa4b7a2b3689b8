"""Other implementations: the frozen linear alone, eager LoRA, PEFT's own layer, and chained addmm_.

Each is called as call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p) -> y with x (M, K), weight (N, K), lora_A (r, K),
lora_B (N, r).  Masks come from torch's default generator, as in training.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import oracle, reference


def frozen_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: float) -> Tensor:
    """y = x Wᵀ + bias: the lower limit."""
    return F.linear(x, weight, bias)


def eager_lora(*tensors: Any, scaling: float, dropout_p: float) -> Tensor:
    """What PEFT's layer computes in training mode: torch's dropout, two linears, one add, one cast."""
    dropout = partial(F.dropout, p=dropout_p) if dropout_p else None
    return reference.lora_linear(*tensors, scaling=scaling, dropout=dropout)


def peft_layer(weights: oracle.Weights, scaling: float, dropout_p: float) -> nn.Module:
    """A `peft.tuners.lora.layer.Linear` with these weights, in training mode.

    Raises:
        ImportError: PEFT is not installed.
    """
    import peft

    weight, lora_A, lora_B, bias = weights
    base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    config = peft.LoraConfig(r=len(lora_A), lora_dropout=dropout_p, target_modules=["linear"])
    layer: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": base})).linear
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    for module, name, tensor in ((base, "weight", weight), (base, "bias", bias), (A, "weight", lora_A), (B, "weight", lora_B)):
        delattr(module, name)  # a parameter, which only another parameter could replace
        setattr(module, name, tensor)
    layer.scaling["default"] = scaling
    return layer.train()


class _ChainedAddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, lora_A, lora_B, bias, scaling, dropout_p = rest
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
            dx.addcmul_(dS @ lora_A, mask, value=keep_scale(ctx.dropout_p))
        return dx, None, dA, dB, None, None, None


def chained_addmm(*tensors: Tensor | None, scaling: float, dropout_p: float) -> Tensor:
    """y = x Wᵀ + bias, then y += scaling · S Bᵀ in place, and dx likewise, as Unsloth and Axolotl do it.

    All tensors share one dtype.  As in Axolotl, the dropped x and the mask are saved for backward.
    """
    return _ChainedAddmm.apply(*tensors, scaling, dropout_p)


def keep_scale(p: float) -> float:
    """The factor that torch's dropout applies to kept elements."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
