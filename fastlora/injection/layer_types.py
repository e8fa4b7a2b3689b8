"""The types of layer that `inject` replaces.  Add a new type to LAYER_TYPES: nothing else lists them."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from fastlora.modules import FusedLoraLinear
from fastlora.quantized import is_quantized
from fastlora.quantized_module import FusedLoraLinear4bit
from fastlora.validation import check_model


@dataclass(frozen=True)
class LayerType:
    """A type of LoRA layer and the frozen layers it replaces.

    Attributes:
        replaces: the replaced layers, as error messages name them.
        matches: whether a module is one of them.
        lora: the class of the LoRA layer: `from_linear` makes it, `to_linear` goes back.
        keys: for each adapter parameter of the LoRA layer, its key in an adapter file below the layer's name.
    """

    replaces: str
    matches: Callable[[nn.Module], bool]
    lora: type[FusedLoraLinear]
    keys: Mapping[str, str]


LINEAR_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def linear_types() -> tuple[type[nn.Module], ...]:
    """What "all-linear" means: nn.Linear and transformers' Conv1D, without importing transformers."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, module.Conv1D) if module else (nn.Linear,)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, GPT-2's linear with a weight stored (in, out)."""
    return isinstance(module, linear_types()[1:])


#: A LoRA class stands after those it is a subclass of.
LAYER_TYPES = (
    LayerType("nn.Linear", lambda module: type(module) is nn.Linear, FusedLoraLinear, LINEAR_KEYS),
    LayerType("transformers' Conv1D", lambda module: type(module) in linear_types()[1:], FusedLoraLinear, LINEAR_KEYS),
    LayerType("bitsandbytes' Linear4bit", is_quantized, FusedLoraLinear4bit, LINEAR_KEYS),
)


def type_replacing(module: nn.Module) -> LayerType | None:
    """The type of LoRA layer that can replace `module`."""
    return next((kind for kind in LAYER_TYPES if kind.matches(module)), None)


def adapter_keys(layer: FusedLoraLinear) -> Mapping[str, str]:
    """The keys of a LoRA layer's adapter parameters in an adapter file, see `LayerType`."""
    return next(kind.keys for kind in reversed(LAYER_TYPES) if isinstance(layer, kind.lora))


def lora_layers(model: nn.Module) -> dict[FusedLoraLinear, list[str]]:
    """The LoRA layers of `model`, each with all of its names.  Raises TypeError when `model` is no module."""
    check_model(model)
    found: dict[FusedLoraLinear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FusedLoraLinear):
            found[module].append(name)
    return found
