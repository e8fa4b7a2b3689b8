"""The adapters that a LoRA layer of PEFT adds in its present state, or the reason why fastlora does not compute them."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fastlora.peft.base import PLAIN_TENSORS
from fastlora.validation import is_altered
from fastlora.variants.several import Adapter

DISABLED = "adapters are disabled"
MERGED = "adapters are merged"
INACTIVE = "no active adapter has weights here"
UNCAST = "casting of the input is disabled"


def active(layer: Any) -> list[str] | str:
    """The names of the active adapters that have weights in the layer, or why it adds none."""
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        return MERGED
    all_A = layer.lora_A  # looked up once: it takes as long as the rest of this function
    return [name for name in layer.active_adapters if name in all_A]


def adapters(layer: Any, names: Sequence[str]) -> list[Adapter] | str:
    """The adapters with these names."""
    if not names:
        return INACTIVE
    given = []
    for name in names:
        if isinstance(one := _adapter(layer, name), str):
            return one
        if one.magnitude is not None and len(names) > 1:
            return "several adapters are active, one of them with DoRA"
        given.append(one)
    return given


def adapter(layer: Any) -> Adapter | str:
    """The only active adapter."""
    names = active(layer)
    if isinstance(names, str):
        return names
    if len(names) > 1:
        return "several adapters are active"
    given = adapters(layer, names)
    return given if isinstance(given, str) else given[0]


def _adapter(layer: Any, name: str) -> Adapter | str:
    magnitude = None
    if name in layer.lora_variant:
        magnitude = _magnitude(layer, name)
        if isinstance(magnitude, str):
            return magnitude
    if not layer.cast_input_dtype_enabled:
        return UNCAST
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"lora_A and lora_B are {type(A).__name__} and {type(B).__name__} instead of plain linears"
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if is_altered(A) or is_altered(B) or is_altered(dropout):
        return "the adapter's modules have hooks, or a forward of their own"
    if A.bias is not None or B.bias is not None:
        return "the adapter has a bias (lora_bias)"
    lora_A, lora_B = A.weight, B.weight
    if type(lora_A) not in PLAIN_TENSORS or type(lora_B) not in PLAIN_TENSORS:
        return f"the adapter's weights are a {type(lora_A).__name__} and a {type(lora_B).__name__}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        # prepare_model_for_compiled_hotswap makes it, to refill it in place. Reading it on the device avoids a synchronisation.
        lora_B, scaling = (lora_B * scaling).to(lora_B.dtype), 1.0
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if magnitude is not None and not layer.training:
        p = 0.0  # DoRA's forward asks the layer too
    return Adapter(lora_A, lora_B, float(scaling), p, magnitude)  # PEFT accepts NumPy's numbers too


def _magnitude(layer: Any, name: str) -> Tensor | str:
    """The magnitude of the DoRA adapter `name`, or why fastlora does not compute the variant."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"the adapter is a variant ({type(layer.lora_variant[name]).__name__})"
    if name not in layer.lora_magnitude_vector:
        held = list(layer.lora_magnitude_vector)
        raise ValueError(f"the DoRA adapter {name!r} has no magnitude: lora_magnitude_vector holds {held}")
    module = layer.lora_magnitude_vector[name]
    if type(module) is not DoraLinearLayer or is_altered(module):
        return "the adapter's modules have hooks, or a forward of their own"
    weight = module.weight
    return weight if type(weight) in PLAIN_TENSORS else f"the adapter's magnitude is a {type(weight).__name__}"
