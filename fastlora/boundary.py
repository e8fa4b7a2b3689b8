"""What the public functions share between the checks of their tensors and their autograd Function."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora import validation
from fastlora.backends import choose_backend
from fastlora.dropout import draw_seed, threshold
from fastlora.quantized import QuantizedWeight, Scheme


class Setting(NamedTuple):
    """How a call runs: its backend, the dropout rate of each adapter, and the seed of the masks, None without dropout."""

    backend: str
    dropout_ps: tuple[float, ...]
    seed: Tensor | None


def cast(tensor: Tensor, autocast: torch.dtype | None) -> Tensor:
    """`tensor` as F.linear would see it."""
    return tensor if autocast is None else tensor.to(validation.autocast_target(tensor, autocast))


def unpack(weight: Tensor | QuantizedWeight, autocast: torch.dtype | None) -> tuple[Tensor, Scheme | None, tuple[Tensor, ...]]:
    """(weight, None, ()) of a dense weight, which autocast casts; (packed, scheme, statistics) of a quantised one."""
    if isinstance(weight, QuantizedWeight):
        return weight.packed, weight.scheme, weight.statistics
    return cast(weight, autocast), None, ()


def changing(lora_B: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(lora_B, scaling); or (scaling · lora_B, 1) where torch.compile traces a scaling that it has seen change.

    A float argument of an operator is a constant of the graph, so that each value would compile anew.  A factor is none.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # not at the top: it imports sympy

        if not has_static_value(scaling):
            return lora_B * scaling, 1.0
    return lora_B, scaling


def settle(
    function: str,
    x: Tensor,
    dropout_ps: Iterable[float],
    training: bool,
    seed: int | Tensor | None,
    backend: str | None,
    autocast: torch.dtype | None,
) -> Setting:
    """The setting of a call of the public `function`, whose tensors have been checked.  A seed that is missing is drawn.

    Raises:
        TypeError, ValueError: a seed or a backend that there is not.
        RuntimeError: a backend that cannot run x, or a functorch transform.
    """
    validation.check_seed(seed, x.device)
    backend = choose_backend(backend, x.device, validation.autocast_target(x, autocast))
    if validation.is_transformed():
        raise RuntimeError(
            f"{function} does not support functorch transforms (torch.func.grad, vmap, jvp, ...): "
            "its backward is not itself differentiable; use torch.autograd"
        )
    rates = tuple(float(p) if training and threshold(p) else 0.0 for p in dropout_ps)
    if not any(rates):
        return Setting(backend, rates, None)
    if seed is None:
        seed = draw_seed(x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)  # without a copy from the host
    return Setting(backend, rates, seed)
