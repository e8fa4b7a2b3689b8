"""adapter_config.json: what PEFT's LoraConfig says of an adapter, written for a model and checked against one."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.injection.matching import exact_pattern, match_modules_to_save, pattern_value
from fastlora.injection.options import LoraOptions
from fastlora.modules import FusedLoraLinear

CONFIG_NAME = "adapter_config.json"

# PEFT's defaults for a config that leaves it out.
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False}
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}

# What a LoRA config may ask for beyond what these layers compute, with the values that ask for nothing. An initialisation asks
# for nothing when it leaves the base weight as it is: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train on another one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
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

# What of a config says where the adapter goes, with the types that JSON may give it.
_NAMES = (str, list)
_TYPES: dict[str, tuple[type, ...]] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": (int, list),
    "layers_pattern": _NAMES,
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": (str,),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "use_rslora": (bool,),
}


def describe(model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None) -> dict[str, Any]:
    """The config of `layers`, by name, in `model`, which was injected with `options`.

    The rank and alpha that most layers have are the config's, the others stand in its patterns.  Raises ValueError when the
    layers differ in what one config holds once.
    """
    shared = {}
    for option in ("lora_dropout", "use_rslora"):
        values = {getattr(layer, option) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"the LoRA linears differ in {option}: {sorted(values)}; one config holds one value")
        shared[option] = values.pop()
    for option, pattern in _PATTERNS.items():
        of_layers = {name: getattr(layer, option) for name, layer in layers.items()}
        [(usual, _)] = Counter(of_layers.values()).most_common(1)
        shared[option] = usual
        shared[pattern] = {exact_pattern(name): value for name, value in of_layers.items() if value != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": options.bias if options else "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": list(options.modules_to_save) if options and options.modules_to_save else None,
        "target_modules": _target_modules(model, layers),
        **shared,
    }


def _target_modules(model: nn.Module, layers: Mapping[str, FusedLoraLinear]) -> list[str] | str:
    """All names of the layers, as a regex where a list of them would match another module by its end."""
    targets: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        (targets if module in layers.values() else others).append(name)
    if any(name.endswith(tuple(f".{target}" for target in targets)) for name in others):
        return "|".join(map(re.escape, targets))
    return targets


def read(path: Path) -> dict[str, Any]:
    """The config at `path`.  Raises ValueError for a file that is no config or asks for what is not computed here."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(config).__name__}")
    for option, value in config.items():
        if option in _NEUTRAL:
            neutral = _NEUTRAL[option]
        elif option not in _KNOWN and _VARIANT.fullmatch(option):
            neutral = _NOTHING
        else:
            _check_type(option, value)
            continue
        if value not in neutral:
            expected = " or ".join(map(repr, neutral))
            raise ValueError(f"{CONFIG_NAME}: {option}={value!r} is not supported, expected {expected}")
    return config


def _check_type(option: str, value: Any) -> None:
    types = _TYPES.get(option)
    if types is None or value is None:
        return
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    of_items: dict[str, tuple[type, ...]] = {
        "layers_to_transform": (int,),
        "rank_pattern": (int,),
        "alpha_pattern": (int, float),
    }
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{CONFIG_NAME}: {option}={value!r} must be {' or '.join(kind.__name__ for kind in types)}")
    if not all(isinstance(item, of_items.get(option, (str,))) for item in items):
        raise ValueError(f"{CONFIG_NAME}: {option}={value!r} holds what it must not")


def options_of(config: Mapping[str, Any], model: nn.Module, adapter_dtype: torch.dtype | None) -> LoraOptions:
    """How to inject into `model` what `config` describes.  PEFT guesses names of modules to save: the absent are left out."""
    if not config.get("target_modules"):
        raise ValueError(f"{CONFIG_NAME} names no target_modules")
    given = {option: config[option] for option in _TYPES if config.get(option) is not None}
    names = [path for path, _ in model.named_modules()]
    given["modules_to_save"] = tuple(
        name for name in given.get("modules_to_save", ()) if any(path.endswith(name) for path in names)
    )
    return LoraOptions(**given, adapter_dtype=adapter_dtype)


def check(
    config: Mapping[str, Any], model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None
) -> None:
    """`config` describes what was injected into `model`.  Raises ValueError that names the difference."""
    bias, names = (options.bias, options.modules_to_save) if options else ("none", ())
    if config.get("bias", "none") != bias:
        raise ValueError(f"{CONFIG_NAME}: bias={config['bias']!r}, but the model was injected with bias={bias!r}")
    saved, expected = (set(match_modules_to_save(model, some)) for some in (config.get("modules_to_save") or (), names))
    if saved != expected:
        raise ValueError(
            f"{CONFIG_NAME}: modules_to_save={config.get('modules_to_save')!r}, but the model was injected with {list(names)}: "
            f"they differ in {', '.join(sorted(saved ^ expected))}"
        )
    for name, layer in layers.items():
        for option, default in _DEFAULTS.items():
            value = config.get(option, default)
            if option in _PATTERNS:
                value = pattern_value(config.get(_PATTERNS[option]) or {}, name, value)
            if value != getattr(layer, option):
                raise ValueError(
                    f"{CONFIG_NAME}: {option}={value!r}, but the layer {name!r} has {option}={getattr(layer, option)!r}"
                )


def encode(config: Mapping[str, Any]) -> bytes:
    """`config` as it is written to the file."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
