"""Adapters on disk, in the format of PEFT: adapter_model.safetensors and adapter_config.json in one folder.

The tensors of a layer at <path> are stored as base_model.model.<path>.lora_A.weight (r, in) and .lora_B.weight (out, r), in
the dtype they train in. PEFT's `PeftModel.from_pretrained` reads what `save_adapter` writes, `load_adapter` what PEFT writes.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.modules import FusedLoraLinear

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."

# What fixes the function of a layer, with PEFT's defaults for a config that leaves it out.
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "fan_in_fan_out": False}

# What a LoRA config may ask for beyond what these layers compute, with the values that ask for nothing. An initialisation asks
# for nothing when it leaves the base weight as it is: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train on another one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}

# PEFT names its variants use_* or *_config; one not known here asks for something when it has any value.
_VARIANT = re.compile("use_.*|.*_config")
_KNOWN = {*_DEFAULTS, *_NEUTRAL, "eva_config"}  # eva_config tells the initialisation of EVA where its data is
_NOTHING: tuple[Any, ...] = (None, False, {})


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of `model`'s LoRA linears to `folder`, which is created when missing.

    Each of the two files is written under another name first and then put in place at once: an interrupted save leaves the file
    that was there whole.

    Raises:
        ValueError: `model` holds no LoRA linear, or its layers differ in rank, alpha, dropout or scaling rule.
        RuntimeError: a layer was merged with keep_base=False: on its weight the adapter would count twice.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    layers = _lora_layers(model)
    _check_base(layers)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _parameters(layers).items()}
    config = _config(model, layers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read adapters from `folder` into the LoRA linears that `model` has (see `fastlora.inject`).

    Every key, shape, dtype, the rank and the scaling are checked before any tensor is changed. A file of lower precision than
    the layer is cast, one of higher precision refused. No path inside the config is followed; lora_dropout stays the layer's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, `model` without LoRA linears, keys missing or unexpected, another shape, dtype,
            rank or scaling, or a feature that these layers do not compute. The model is then unchanged.
        RuntimeError: a layer is merged, so that its weight holds another adapter. The model is then unchanged.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    folder = Path(folder)
    layers = _lora_layers(model)
    _check_base(layers)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"{merged[0]!r} is merged, a new adapter would have no effect on it: unmerge() it first")
    config = _read_config(folder / CONFIG_NAME)
    _check_config(config, layers)
    path = folder / WEIGHTS_NAME
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    parameters = _parameters(layers)
    _check_tensors(tensors, parameters, path)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _lora_layers(model: nn.Module) -> dict[str, FusedLoraLinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FusedLoraLinear) and m.lora_A is not None}
    if not layers:
        raise ValueError("model holds no LoRA linear: call fastlora.inject(model, target_modules=...) first")
    return layers


def _check_base(layers: Mapping[str, FusedLoraLinear]) -> None:
    """An adapter belongs to a base weight, which every layer must still have, merged or not."""
    for path, layer in layers.items():
        if layer.merged and layer._base_weight is None:
            raise RuntimeError(
                f"{path!r} is merged, and merge(keep_base=False) dropped the base weight that an adapter belongs to: "
                "save before such a merge, load into a new layer on the base weight"
            )


def _parameters(layers: Mapping[str, FusedLoraLinear]) -> dict[str, Tensor]:
    """The adapters' parameters under the names they have in the file."""
    return {
        f"{_PREFIX}{path}.{name}.weight": getattr(layer, name)
        for path, layer in layers.items()
        for name in ("lora_A", "lora_B")
    }


def _config(model: nn.Module, layers: Mapping[str, FusedLoraLinear]) -> dict[str, Any]:
    shared = {}
    for option in (*_DEFAULTS, "lora_dropout"):
        values = {getattr(layer, option) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"the LoRA linears differ in {option}: {sorted(values)}; one config holds one value")
        shared[option] = values.pop()
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(layers),
        **shared,
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(config).__name__}")
    return config


def _check_config(config: Mapping[str, Any], layers: Mapping[str, FusedLoraLinear]) -> None:
    for option, value in config.items():
        if option in _NEUTRAL:
            neutral = _NEUTRAL[option]
        elif option not in _KNOWN and _VARIANT.fullmatch(option):
            neutral = _NOTHING
        else:
            continue
        if value not in neutral:
            expected = " or ".join(map(repr, neutral))
            raise ValueError(f"{CONFIG_NAME}: {option}={value!r} is not supported, expected {expected}")
    for path, layer in layers.items():
        for option, default in _DEFAULTS.items():
            expected, got = getattr(layer, option), config.get(option, default)
            if got != expected:
                raise ValueError(f"{CONFIG_NAME}: {option}={got!r}, but the layer {path!r} has {option}={expected!r}")


def _check_tensors(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: Path) -> None:
    if missing := parameters.keys() - tensors.keys():
        raise ValueError(f"{str(path)!r} lacks {len(missing)} keys that this model has, such as {min(missing)!r}")
    if unexpected := tensors.keys() - parameters.keys():
        raise ValueError(f"{str(path)!r} has {len(unexpected)} keys that this model lacks, such as {min(unexpected)!r}")
    for key, parameter in parameters.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{str(path)!r}: {key!r} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, parameter.dtype) != parameter.dtype:
            raise ValueError(f"{str(path)!r}: {key!r} is {tensor.dtype}, which {parameter.dtype} cannot hold exactly")


def _replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: readers and a crash see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('adapter files need safetensors: pip install "fastlora[hf]"') from error
    return safetensors
