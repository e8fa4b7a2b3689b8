"""PEFT's LoRA layers in a model: find them, make them accelerated layers and PEFT's again, and describe them."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from peft.tuners.lora import layer as pefts
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from fastlora.backends import available_backends
from fastlora.blocks.sharing import Group, groups, single_reason
from fastlora.peft import conv, embedding, experts
from fastlora.peft.base import weight_of
from fastlora.peft.calls import operands
from fastlora.peft.fused import FUSED, Fused
from fastlora.peft.report import Report, Tally
from fastlora.validation import check_model

#: PEFT's modules whose layers exist with an optional library only, and the modules of their accelerated forms.
OPTIONAL = {"peft.tuners.lora.bnb": "fastlora.peft.bnb", "peft.tuners.lora.hqq": "fastlora.peft.hqq"}

#: PEFT's layers that are no linears: their accelerated classes, and the module that decides for each.
_OTHERS: dict[type[nn.Module], tuple[type[Fused], Any]] = {
    ParamWrapper: (experts.ParamWrapper, experts),
    pefts.Embedding: (embedding.FusedEmbedding, embedding),
    pefts.Conv1d: (conv.FusedConv1d, conv),
    pefts.Conv2d: (conv.FusedConv2d, conv),
    pefts.Conv3d: (conv.FusedConv3d, conv),
}


def _other(layer: Any) -> Any:
    """The module that decides for the layer, or None for a linear."""
    return next((module for kind, (_, module) in _OTHERS.items() if isinstance(layer, kind)), None)


def find(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers in `model`, by name.

    Raises:
        TypeError: model is not an nn.Module.  ValueError: there are none.
    """
    check_model(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not found:
        raise ValueError(f"model, a {type(model).__name__}, holds no LoRA layer of PEFT's: call peft.get_peft_model(...) first")
    return found


def is_fused(layer: Any) -> bool:
    """Whether the layer is accelerated."""
    return isinstance(layer, Fused)


def unsupported_reason(layer: Any) -> str | None:
    """Why `fuse` cannot take the layer, whatever its adapters are; None if it can."""
    if is_fused(layer):
        return "already accelerated"
    if _fused_class(layer) is None:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}, not peft's lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    other = _other(layer)
    if other is None:
        weight = weight_of(layer.base_layer)
    elif (weight := other.unsupported_reason(layer)) is None:
        weight = layer.get_param() if other is experts else layer.base_layer.weight
    if isinstance(weight, str):
        return weight
    return "its base weight is on the meta device: load it first" if weight.device.type == "meta" else None


def describe(layers: Mapping[str, Any], already: tuple[str, ...] = ()) -> Report:
    """The report on layers as they are now; `already` names those that an earlier call accelerated."""
    taken, waiting, left = [], [], []
    for name, layer in layers.items():
        if not is_fused(layer):
            left.append((name, unsupported_reason(layer) or "not accelerated"))
        elif isinstance(given := _other(layer).terms(layer) if _other(layer) else operands(layer), str):
            waiting.append((name, given))
        else:
            taken.append(name)
    linears = [layer for layer in layers.values() if is_fused(layer) and _other(layer) is None]
    weights = [weight_of(layer.base_layer) for layer in linears]
    devices = {weight.device for weight in weights if not isinstance(weight, str)}
    backends = sorted({(device.type, available_backends(device)[0]) for device in devices})
    single = tuple((name, reason) for name, layer in layers.items() if (reason := single_reason(layer)))
    return Report(tuple(taken), tuple(waiting), tuple(left), already, tuple(backends), groups(layers), single)


def fuse(layer: Any, warned: set[str]) -> None:
    """Accelerate a layer that has no `unsupported_reason`; `warned` is shared by the layers of a model."""
    layer._fastlora_tally = Tally(warned)
    layer.__class__ = _fused_class(layer)
    share(layer, True)


def share(layer: Any, groups: bool) -> None:
    """Let an accelerated linear learn with which others it shares x, or compute alone."""
    layer._fastlora_group = Group() if groups and _other(layer) is None else None


def restore(layer: Any) -> None:
    """Give an accelerated layer its class back."""
    layer.__class__ = type(layer).__bases__[1]
    del layer._fastlora_tally, layer._fastlora_group


def _fused_class(layer: nn.Module) -> type[Fused] | None:
    """The accelerated class for a layer of PEFT, if there is one."""
    fused = FUSED | {kind: fused for kind, (fused, _) in _OTHERS.items()}
    if type(layer).__module__ in OPTIONAL:
        fused = import_module(OPTIONAL[type(layer).__module__]).FUSED
    return fused.get(type(layer))
