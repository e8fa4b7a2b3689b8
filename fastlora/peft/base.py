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
    plain = kind is nn.Linear or kind is Conv1D or name in _LIKE_LINEAR
    packed = not plain and quantized.is_quantized(base_layer)
    if not plain and not packed:
        return f"its base layer is a {name}"
    if is_altered(base_layer):
        return "its base layer has hooks, or a forward of its own"
    weight, bias = cast(Tensor, base_layer.weight), base_layer.bias
    if type(weight) not in PLAIN_TENSORS and not packed:
        return f"its base weight is a {type(weight).__name__}"
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return f"its base bias is a {type(bias).__name__}"
    if packed:
        reason = quantized.unsupported_reason(base_layer)
        return f"its base layer {reason}" if reason else quantized.weight_of(base_layer)
    return weight.t() if kind is Conv1D else weight
