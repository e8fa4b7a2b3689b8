"""The frozen linear below a LoRA layer: its weight, or the reason why the weight cannot be read from outside."""

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import quantized
from fastlora.quantized import QuantizedWeight
from fastlora.validation import is_altered

PLAIN_TENSORS = (Tensor, nn.Parameter)

#: Subclasses of nn.Linear whose forward is x Wᵀ + bias too.
_LIKE_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


def weight_of(base_layer: nn.Module) -> Tensor | QuantizedWeight | str:
    """W (out, in) such that base_layer(x) = x Wᵀ + base_layer.bias, or the reason why there is no such W.

    A Conv1D stores Wᵀ, so its W is a view.
    """
    kind = type(base_layer)
    name = f"{kind.__module__}.{kind.__name__}"
    linear = kind is nn.Linear or kind is Conv1D or name in _LIKE_LINEAR
    weight = cast(Tensor | None, getattr(base_layer, "weight", None)) if linear else None
    packed = None
    if type(weight) not in PLAIN_TENSORS and (packed := quantized.read(base_layer)) is None:
        return f"its base weight is a {type(weight).__name__}" if linear else f"its base layer is a {name}"
    if is_altered(base_layer):
        return "its base layer has hooks, or a forward of its own"
    bias = base_layer.bias
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return f"its base bias is a {type(bias).__name__}"
    if packed is not None:
        return f"its base layer {packed}" if isinstance(packed, str) else packed
    assert weight is not None
    return weight.t() if kind is Conv1D else weight
