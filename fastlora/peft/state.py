"""What PEFT's embeddings and convolutions have in common for a fused call: which adapter, and which circumstances."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from fastlora.peft.adapters import DISABLED, INACTIVE, MERGED
from fastlora.peft.base import PLAIN_TENSORS
from fastlora.validation import HALF_DTYPES, autocast_dtype, is_transformed
from fastlora.variants.several import Adapter


def only_adapter(layer: Any, held: Container[str]) -> list[str] | str:
    """[name of the one active adapter among those `held`], or why the layer runs PEFT's forward."""
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        return MERGED
    names = [name for name in layer.active_adapters if name in held]
    if len(names) != 1:
        return "several adapters are active" if names else INACTIVE
    if names[0] in layer.lora_variant:
        return f"the adapter is a variant ({type(layer.lora_variant[names[0]]).__name__})"
    return names


def unsupported_tensors(layer: Any, given: Adapter) -> str | None:
    """Why the frozen weight and the adapter cannot be computed with, or None."""
    weight, (A, B, scaling, *_) = layer.base_layer.weight, given
    if not all(type(tensor) in PLAIN_TENSORS for tensor in (weight, A, B)):
        return f"its weights are a {type(weight).__name__}, a {type(A).__name__} and a {type(B).__name__}"
    if isinstance(scaling, Tensor):
        return "its scaling is a tensor, as prepare_model_for_compiled_hotswap makes it"
    if weight.requires_grad and not is_transformed():
        return "its base weight is trainable"
    if not weight.device == A.device == B.device:
        return f"its base weight is on {weight.device}, the adapter on {A.device} and {B.device}"
    if A.dtype != B.dtype or not (A.dtype == weight.dtype or (A.dtype == torch.float32 and weight.dtype in HALF_DTYPES)):
        return f"its base weight is {weight.dtype}, the adapter {A.dtype} and {B.dtype}"
    return None


def unsupported_call(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the circumstances of layer(x, *args, **kwargs) need PEFT's forward, or None."""
    if kwargs.get("adapter_names") is not None:
        return "adapter_names mixes adapters in one batch, which is fused for linears only"
    if args or any(value is not None for value in kwargs.values()):
        return "the layer is called with more than x"
    if type(x) not in PLAIN_TENSORS or x.layout != torch.strided or x.is_nested:
        return f"x is a {type(x).__name__} that is not dense"
    if x.device != layer.base_layer.weight.device:
        return f"x is on {x.device}, the base weight on {layer.base_layer.weight.device}"
    if is_transformed():
        return "a functorch transform (torch.func) is active"
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return "torch.jit is tracing"
    if autocast_dtype(x.device) is None and x.is_floating_point() and x.dtype != layer.base_layer.weight.dtype:
        return f"x is {x.dtype}, the base weight {layer.base_layer.weight.dtype}"
    return None
