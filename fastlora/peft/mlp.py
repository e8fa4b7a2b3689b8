"""Gated MLPs of a PEFT model, computed as one step by `lora_mlp` where that is what their forward computes.

`fastlora.peft.gated` finds them.  A module is attached after one probe: its own forward and `lora_mlp` agree on two random rows
in evaluation mode.  An attached module decides at each call.  It is fused if

    the linears   are accelerated LoRA layers or frozen linears, each of which would be fused by itself (`fastlora.peft.calls`),
                  and neither they nor the activation have hooks or a forward of their own
    the call      passes x alone, in evaluation mode or without a dropout between the product and the last linear
    the dtypes    fit each linear; x has the dtype that the linears compute in, where a weight is quantised

Otherwise its own forward runs, and each layer decides for itself.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fastlora.blocks.mlp import lora_mlp
from fastlora.blocks.projections import Projection
from fastlora.oracle import FLOOR, relative_error
from fastlora.peft.base import weight_of
from fastlora.peft.calls import Operands, _too_small, operands, unsupported_input
from fastlora.peft.fused import Fused
from fastlora.peft.gated import Parts, parts_of, shape_of
from fastlora.quantized import QuantizedWeight
from fastlora.validation import autocast_dtype, autocast_target, is_altered

ROUNDINGS = 5  # e, g, act(e), h and y, in each of two results


class GatedMlp(nn.Module):
    """A mixin before the class of a gated MLP.  Its forward is `lora_mlp` wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        given = decide(self, x) if not args and not kwargs else "it is called with more than x"
        if isinstance(given, str):
            return super().forward(x, *args, **kwargs)
        activation, projections = given
        return lora_mlp(x, *projections, activation=activation)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the MLP's own class: the fused one is made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)  # copyreg.__newobj__, (class, ...), state, ...
        return _new, (_own_class(self), *reduced[1][1:]), *reduced[2:]


@functools.cache
def _fused_class(kind: Any) -> Any:
    """The class of an attached module whose class was `kind`."""
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_fastlora_shape": shape_of(kind.forward)}
    return type(f"Fused{kind.__name__}", (GatedMlp, kind), names)


def _new(kind: Any, *arguments: Any) -> Any:
    fused = _fused_class(kind)
    return fused.__new__(fused, *arguments)


class _Bare(NamedTuple):
    """A linear without an adapter where `unsupported_input` looks for a LoRA layer."""

    base_layer: nn.Module


def decide(module: nn.Module, x: Tensor) -> tuple[str, list[Projection]] | str:
    """The activation, and gate, up and down of a fused call; or the reason why module(x) runs its own forward."""
    if reason := _too_small(x):
        return reason
    return operands_of(module, x)


def operands_of(module: nn.Module, x: Tensor) -> tuple[str, list[Projection]] | str:
    """`decide` for a call of any size."""
    parts = parts_of(module, _own_class(module))
    if not isinstance(parts, Parts):
        return parts or "it is no gated MLP"
    if any(other.training and other.p for other in parts.between):
        return "a dropout stands before its last linear"
    projections = []
    for name, linear in (("gate", parts.gate), ("up", parts.up), ("down", parts.down)):
        given = _projection(linear, x)
        if isinstance(given, str):
            return f"its {name} is not fused: {given}"
        projections.append(given)
    return parts.activation, projections


def _projection(linear: Any, x: Tensor) -> Projection | str:
    """One linear of a fused call, or why the call is not fused."""
    if is_altered(linear):
        return "it has hooks, or a forward of its own"
    if isinstance(linear, LoraLayer):
        given = operands(linear) if isinstance(linear, Fused) else "it is not accelerated"
        if isinstance(given, str):
            return given
        if not given.is_plain:
            return "its adapter is DoRA, or one of several"
        reason, projection = unsupported_input(x, given, linear), Projection(*given[:6])
    else:
        weight = weight_of(linear)
        if isinstance(weight, str):
            return weight
        if isinstance(weight, Tensor) and weight.requires_grad:
            return "its weight is trainable"
        bare = Operands(weight, x, x, linear.bias, 1.0, 0.0)  # an adapter in x's dtype fits wherever x does
        reason, projection = unsupported_input(x, bare, _Bare(linear)), Projection(weight, None, None, linear.bias)
    if isinstance(projection.weight, QuantizedWeight) and autocast_target(x, autocast_dtype(x.device)) != x.dtype:
        return "its weight is quantised and autocast is on: its output would be cast to x's dtype"
    return reason or projection


def find(model: nn.Module) -> dict[str, nn.Module]:
    """The gated MLPs of `model` with a LoRA layer in them, by name, attached or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, LoraLayer) for child in module.children()) and parts_of(module, _own_class(module)) is not None
    }


def attach(model: nn.Module) -> None:
    """Compute the gated MLPs of `model` that have no `unsupported_reason` as one step each."""
    for module in find(model).values():
        if unsupported_reason(module) is None:
            module.__class__ = _fused_class(cast(Any, type(module)))


def detach(model: nn.Module) -> None:
    """Give every attached module its class back."""
    for module in model.modules():
        if isinstance(module, GatedMlp):
            cast(Any, module).__class__ = _own_class(module)


def describe(model: nn.Module, left: bool) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(names of the modules that are attached, with `left` (name, reason) of the gated MLPs that are not)."""
    found = find(model)
    others = [(name, unsupported_reason(module)) for name, module in found.items() if left and not isinstance(module, GatedMlp)]
    attached = tuple(name for name, module in found.items() if isinstance(module, GatedMlp))
    return attached, tuple((name, reason or "not attached") for name, reason in others)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why a gated MLP is not attached, or None: it cannot be fused as it is now, or the probe disagrees."""
    if isinstance(module, GatedMlp):
        return "already attached"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    parts = parts_of(module, type(module))
    if not isinstance(parts, Parts):
        return parts or "it is no gated MLP"
    weight = weight_of(getattr(parts.gate, "base_layer", parts.gate))
    if isinstance(weight, str):
        return weight
    dtype = weight.dtype if isinstance(weight, Tensor) else weight.compute_dtype or torch.float32
    generator = torch.Generator(weight.device).manual_seed(0)  # not the default one: its state is the user's
    x = torch.randn((1, 2, weight.shape[1]), generator=generator, device=weight.device).to(dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), _in_evaluation(module):
        given = operands_of(module, x)
        if isinstance(given, str):
            return given
        error = relative_error(lora_mlp(x, *given[1], activation=given[0], training=False), module(x))
    bound = 2 * ROUNDINGS * FLOOR[dtype, dtype]
    return None if error <= bound else f"its forward computes something else: error {error:.1e} on two random rows"


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    """No dropout, and no call counted as a fallback."""
    training = [(part, part.training) for part in module.modules()]
    tallies = [part._fastlora_tally for part in module.modules() if isinstance(part, Fused)]
    counts = [tally.fallbacks.copy() for tally in tallies]
    module.eval()
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag
        for tally, count in zip(tallies, counts, strict=True):
            tally.fallbacks = count


def _own_class(module: nn.Module) -> type[nn.Module]:
    kind: type[nn.Module] = type(module).__bases__[1] if isinstance(module, GatedMlp) else type(module)
    return kind
