"""From an injected model back to a plain one, with its adapters merged into the weights or without them."""

from typing import Any

import torch
from torch import nn

from fastlora.injection import fast_path
from fastlora.injection.inject import injected
from fastlora.injection.matching import embeddings, warn
from fastlora.injection.walk import replace, some_lora_layers, unwrapped
from fastlora.layers.base import FusedLoraLayer
from fastlora.quantized import is_quantized


def merge_and_unload(model: nn.Module, safe_merge: bool = False) -> nn.Module:
    """Fold every adapter into its weight, W + scaling · B A, and put plain modules back, in place.

    Every merged weight is a new tensor in the base weight's dtype (of a 4-bit one: before quantisation), which requires no
    gradient.  Where a weight was tied to another module's, the other keeps the base weight.  Modules to save and trained
    biases stay as they were trained, and requires_grad of all that is left as it is.

    Args:
        safe_merge: check first that all merged weights are finite.

    Returns:
        `model` itself (a new plain module, where `model` is a LoRA layer).

    Raises:
        ValueError: `model` holds no LoRA layer or one that cannot be merged, a convolution with groups, or with safe_merge
            a merged weight is not finite.  The model is unchanged.
    """
    layers = some_lora_layers(model)
    for layer, names in layers.items():
        if reason := layer.unmergeable_reason():
            raise ValueError(f"{names[0]!r} cannot be merged: {reason}")
        if safe_merge and not torch.isfinite(layer.to_plain(merged=True).get_parameter("weight")).all():
            raise ValueError(f"safe_merge: the merged weight of {names[0]!r} has infinite or NaN elements")
    return _replace(model, layers, merged=True)


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter and put plain modules, or Linear4bit, back on the base weights, in place.

    As in PEFT, modules to save and trained biases stay as they were trained, and requires_grad of all that is left as it is.

    Returns:
        `model` itself (a new plain module, where `model` is a LoRA layer).

    Raises:
        ValueError: `model` holds no LoRA layer.
        RuntimeError: a layer was merged with keep_base=False and has no base weight.  The model is unchanged.
    """
    layers = some_lora_layers(model)
    for layer, names in layers.items():
        if layer.merged and layer._base_weight is None:
            raise RuntimeError(f"{names[0]!r} is merged, and merge(keep_base=False) dropped the base weight to go back to")
    return _replace(model, layers, merged=False)


def _replace(model: nn.Module, layers: dict[FusedLoraLayer, list[str]], *, merged: bool) -> nn.Module:
    bases, replaced = injected(model) or [unwrapped(model)], set()
    for layer in list(layers):
        names = layers.pop(layer)  # frees the base weight of a merged layer before the next is merged
        plain = layer.to_plain(merged)
        if names[0] == "":
            return plain
        for name in names:
            replace(model, name, plain)
        replaced.add(plain)
    fast_path.take_again(model)
    for base in bases:
        vars(base).pop("lora_options", None)
        _tell_config_of_untying(base)
        _tell_config_of_dense_weights(base, replaced)
    return model


def _tell_config_of_untying(model: nn.Module) -> None:
    """Correct a transformers config that says the embeddings are tied: saving would lose one of the two."""
    config: Any = getattr(model, "config", None)
    tokens, head = embeddings(model, "input"), embeddings(model, "output")
    tied = tokens is None or head is None or head.weight is tokens.weight
    if getattr(config, "tie_word_embeddings", False) and not tied:
        config.tie_word_embeddings = False
        warn("the input and output embeddings are no longer tied: config.tie_word_embeddings is now False")


def _tell_config_of_dense_weights(model: nn.Module, replaced: set[nn.Module]) -> None:
    """Correct the config of a transformers model loaded in 4 bits: it would still say so of weights that are dense now."""
    quantizer = getattr(model, "hf_quantizer", None)
    dense = [name for name, module in model.named_modules() if module in replaced and not is_quantized(module)]
    if quantizer is None or not dense:
        return
    if any(is_quantized(module) for module in model.modules()):
        quantizer.quantization_config.llm_int8_skip_modules = [*quantizer.modules_to_not_convert, *dense]
    else:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False  # type: ignore[assignment]  # not a submodule: transformers' flag
