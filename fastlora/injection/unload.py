"""From an injected model back to a plain one, with its adapters merged into the weights or without them."""

from typing import Any

import torch
from torch import nn

from fastlora.injection.matching import embeddings, warn
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import is_quantized
from fastlora.quantized_module import FusedLoraLinear4bit
from fastlora.validation import check_model


def merge_and_unload(model: nn.Module, safe_merge: bool = False) -> nn.Module:
    """Fold every adapter into its weight, W + scaling · B A, and put plain linears back, in place.

    Every merged weight is a new tensor in the base weight's dtype (of a 4-bit one: before quantisation), which requires no
    gradient; one that was tied to another module's is untied, and the other keeps the base weight.  Modules to save and trained
    biases stay as they were trained, and requires_grad of all that is left as it is.

    Args:
        safe_merge: check first that all merged weights are finite.

    Returns:
        `model` itself (a new plain linear, where `model` is a LoRA linear).

    Raises:
        ValueError: `model` holds no LoRA linear, or with safe_merge a merged weight is not finite.  The model is unchanged.
    """
    layers = _layers(model)
    if safe_merge:
        for layer in dict.fromkeys(layers.values()):
            weight = layer.weight if layer.merged else layer.merged_weight()
            if not torch.isfinite(weight).all():
                broken = next(name for name, other in layers.items() if other is layer)
                raise ValueError(f"safe_merge: the merged weight of {broken!r} has infinite or NaN elements")
    for layer in dict.fromkeys(layers.values()):
        if not layer.merged and not isinstance(layer, FusedLoraLinear4bit):
            layer.merge(keep_base=False)
    return _replace(model, layers, merged=True)


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter and put plain linears, or Linear4bit, back on the base weights, in place.

    As in PEFT, modules to save and trained biases stay as they were trained, and requires_grad of all that is left as it is.

    Returns:
        `model` itself (a new plain linear, where `model` is a LoRA linear).

    Raises:
        ValueError: `model` holds no LoRA linear.
        RuntimeError: a layer was merged with keep_base=False and has no base weight.  The model is unchanged.
    """
    layers = _layers(model)
    for name, layer in layers.items():
        if layer.merged and layer._base_weight is None:
            raise RuntimeError(f"{name!r} is merged, and merge(keep_base=False) dropped the base weight to go back to")
    for layer in dict.fromkeys(layers.values()):
        if layer.merged:
            layer.unmerge()
    return _replace(model, layers, merged=False)


def _layers(model: nn.Module) -> dict[str, FusedLoraLinear]:
    check_model(model)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, FusedLoraLinear)}
    if not layers:
        raise ValueError("model holds no LoRA linear: there is nothing to unload")
    return layers


def _replace(model: nn.Module, layers: dict[str, FusedLoraLinear], *, merged: bool) -> nn.Module:
    plain = {layer: _plain(layer, merged) for layer in dict.fromkeys(layers.values())}
    for name, layer in layers.items():
        if not name:
            return plain[layer]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain[layer])
    if hasattr(model, "lora_options"):
        del model.lora_options
    _tell_config_of_untying(model)
    _tell_config_of_dense_weights(model, [name for name in layers if not is_quantized(model.get_submodule(name))])
    return model


def _plain(layer: FusedLoraLinear, merged: bool) -> nn.Module:
    """nn.Linear, or transformers' Conv1D for a weight stored (in, out), with the parameters of `layer`."""
    if isinstance(layer, FusedLoraLinear4bit):
        return layer.to_linear(merged).train(layer.training)
    with torch.device("meta"):  # what the constructor draws is thrown away
        if layer.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            linear: nn.Module = Conv1D(layer.out_features, layer.in_features)
        else:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight, linear.bias = layer.weight, layer.bias  # type: ignore[assignment]  # bias None where it was
    return linear.train(layer.training)


def _tell_config_of_untying(model: nn.Module) -> None:
    """A transformers model whose config says that its embeddings are tied would lose one of two on saving."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    tokens, head = embeddings(model, "input"), embeddings(model, "output")
    if tokens is not None and head is not None and head.weight is not tokens.weight:
        config.tie_word_embeddings = False
        warn("the input and output embeddings are no longer tied: config.tie_word_embeddings is now False")


def _tell_config_of_dense_weights(model: nn.Module, dense: list[str]) -> None:
    """A transformers model that was loaded in 4 bits would be saved with a config that still says so of what is dense now."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not dense:
        return
    if any(is_quantized(module) for module in model.modules()):
        quantizer.quantization_config.llm_int8_skip_modules = [*quantizer.modules_to_not_convert, *dense]
    else:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False  # type: ignore[assignment]  # not a submodule: transformers' flag
