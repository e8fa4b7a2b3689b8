"""The tiny Llama on quantised linears, and in float64 on what they stand for."""

import copy
from collections.abc import Callable

import torch
from peft_models import build
from quantized_layers import quantize
from torch import nn

from fastlora import quantized
from fastlora.peft import layers


def with_linears(dtype: torch.dtype, made_of: Callable[[torch.Tensor], nn.Module]) -> nn.Module:
    """The tiny Llama in dtype with every linear but the head made of its weight."""
    model = build("llama", dtype)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            model.set_submodule(name, made_of(linear.weight.detach()))
    return model


def quantized_llama(kind: str, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """The tiny Llama with every linear but the head quantised, as transformers loads it."""
    options = {} if kind == "int8" else {"compute_dtype": compute_dtype}
    model = with_linears(dtype, lambda weight: quantize(weight, kind, **options))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model


def dense(model: nn.Module) -> nn.Module:
    """A float64 copy of PEFT's model on the weights that the packed ones stand for."""
    model = copy.deepcopy(model)
    for layer in layers.find(model).values():
        weight = quantized.weight_of(layer.base_layer).dequantize(torch.float32)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer.base_layer = linear
    return model.double()
