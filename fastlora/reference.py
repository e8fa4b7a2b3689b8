"""The one eager implementation: plain torch operations, any float dtype, differentiable by autograd."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.dropout import draw_seed, keep_scale, threshold
from fastlora.functional import dropout_mask
from fastlora.modules import FusedLoraLinear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, with the operations and casts of `peft.tuners.lora.layer.Linear`.

    drop(x) = x · keep_scale(p) where kept, else 0.  The base layer sees x uncast.  x is cast to A's dtype for the bypass.
    The sum is cast once, to the base output's dtype.

    Args:
        x: (..., in).  weight: (out, in).  lora_A: (r, in).  lora_B: (out, r).  bias: (out,) or None.
        dropout_p: the rate that made `keep_mask`; it only sets the scale of the kept elements.
        keep_mask: bool (M, in) with M = x.numel() // in, True = kept, as `fastlora.dropout_mask` returns; required when
            dropout_p rounds to a threshold above 0.
        dropout: drop(x) itself, instead of dropout_p and keep_mask; F.dropout, for example.

    Returns:
        (..., out) in the dtype of F.linear(x, weight, bias).

    Raises:
        ValueError: dropout_p > 0 without a mask, a mask of another shape, or `dropout` together with dropout_p or keep_mask.
    """
    if dropout is not None and (dropout_p or keep_mask is not None):
        raise ValueError("give either dropout, or dropout_p with keep_mask")
    base = F.linear(x, weight, bias)
    dropped = x.to(lora_A.dtype)
    if dropout is not None:
        dropped = dropout(dropped)
    elif threshold(dropout_p) > 0:
        dropped = _dropped(dropped, dropout_p, keep_mask)
    return (base + F.linear(F.linear(dropped, lora_A), lora_B) * scaling).to(base.dtype)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """The forward of `fastlora.variants.dora`, with the operations and casts of `peft.tuners.lora.dora.DoraLinearLayer`.

    Args:
        magnitude: (out,).  The others are those of `lora_linear`.
    """
    base, dropped, W = F.linear(x, weight, bias), x.to(lora_A.dtype), weight.to(lora_A.dtype)
    n = torch.linalg.vector_norm(W + scaling * (lora_B @ lora_A), dim=1).detach()
    factor = magnitude / n
    if threshold(dropout_p) > 0:
        dropped = _dropped(dropped, dropout_p, keep_mask)
        unscaled = F.linear(dropped, W)
    else:
        unscaled = base if bias is None else base - bias
    return (base + (factor - 1) * unscaled + factor * F.linear(F.linear(dropped, lora_A), lora_B) * scaling).to(base.dtype)


def _dropped(x: Tensor, dropout_p: float, keep_mask: Tensor | None) -> Tensor:
    """drop(x) by `keep_mask`, see `lora_linear`."""
    expected = (x[..., 0].numel() if x.shape[-1] else 0, x.shape[-1])
    if keep_mask is None or (keep_mask.numel() and tuple(keep_mask.shape) != expected):
        shape = None if keep_mask is None else tuple(keep_mask.shape)
        raise ValueError(f"keep_mask must be a bool tensor of shape {expected} when dropout_p={dropout_p}, got {shape}")
    return torch.where(keep_mask.reshape(x.shape), x * keep_scale(dropout_p), 0.0)


class EagerLoraLinear(FusedLoraLinear):
    """FusedLoraLinear on `lora_linear` above: separate torch operations, each of which saves its own tensors for backward.

    The same generator state gives the same dropout mask as in FusedLoraLinear.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged or self.lora_A is None or self.lora_B is None:
            return super().forward(x)
        p, mask = self.lora_dropout if self.training else 0.0, None
        if threshold(p):
            mask = dropout_mask(draw_seed(x.device), x[..., 0].numel(), x.shape[-1], p)
        tensors = x, self._W(), self.lora_A, self._B(self.lora_B), self.bias
        magnitude = self.lora_magnitude_vector
        linear = lora_linear if magnitude is None else functools.partial(dora_linear, magnitude=magnitude)
        return linear(*tensors, scaling=self.scaling, dropout_p=p, keep_mask=mask)
