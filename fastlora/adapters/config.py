"""adapter_config.json: what PEFT's LoraConfig says of an adapter, written for a model and checked against one."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.injection.matching import match_modules_to_save
from fastlora.injection.options import LoraOptions
from fastlora.injection.walk import named_modules
from fastlora.layers.base import FusedLoraLayer

CONFIG_NAME = "adapter_config.json"

# The options of `inject` that PEFT's config shares.
_SHARED = {field.name for field in fields(LoraOptions)} - {"fan_in_fan_out", "adapter_dtype", "quantize", "enable_lora"}

# Options for features that these layers do not compute, with the values that ask for none.  An initialisation asks for none
# if it keeps the base weight: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train on another one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None, []),
    "enable_lora": (None, []),  # of PEFT's first version, whose files held B's pairs as loralib does
}
# PEFT names its variants use_* or *_config.  eva_config only says where the data of EVA's initialisation is.
_VARIANT = re.compile("use_.*|(?!eva_).*_config")


def describe(model: nn.Module, layers: Mapping[str, FusedLoraLayer], options: LoraOptions) -> dict[str, Any]:
    """The config of `layers`, by name, in `model`, which was injected with `options`.

    The most frequent rank and alpha are the config's; its patterns hold the others.  Raises ValueError when the layers differ
    in what one config holds once.
    """
    # The class that fully_shard puts in front of the model's own must not make two files of one model differ.
    kind = next(each for each in type(model).__mro__ if not each.__module__.startswith("torch.distributed.fsdp"))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": options.bias,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": list(options.modules_to_save) or None,
        "target_modules": _target_modules(model, layers),
    }
    for option in ("lora_dropout", "use_rslora", "use_dora"):
        values = {getattr(layer, option) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"the LoRA layers differ in {option}: {sorted(values)}; one config holds one value")
        config[option] = values.pop()
    for option, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        by_name = {name: layer.of_config()[option] for name, layer in layers.items()}
        config[option] = usual = Counter(by_name.values()).most_common(1)[0][0]
        config[pattern] = {f"^{re.escape(name)}": value for name, value in by_name.items() if value != usual}
    return config


def _target_modules(model: nn.Module, layers: Mapping[str, FusedLoraLayer]) -> list[str] | str:
    """All names of the layers, as a regex where a list of them would match another module by its end."""
    named = list(named_modules(model))
    targets = [name for name, module in named if module in layers.values()]
    ends = tuple(f".{name}" for name in targets)
    ambiguous = any(name.endswith(ends) for name, _ in named if name not in targets)
    return "|".join(map(re.escape, targets)) if ambiguous else targets


def read(path: Path) -> LoraOptions:
    """The options in the config at `path`.  Raises ValueError for a file that is no config or asks for what is not computed."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter where it nests too deep
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(config).__name__}")
    for option in config.keys() - _SHARED:
        neutral = (None, False, {}) if _VARIANT.fullmatch(option) else _NEUTRAL.get(option, (config[option],))
        if config[option] not in neutral:
            expected = " or ".join(map(repr, neutral))
            raise ValueError(f"{CONFIG_NAME}: {option}={config[option]!r} is not supported, expected {expected}")
    try:
        return LoraOptions(**{option: config[option] for option in config.keys() & _SHARED if config[option] is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME}: {error}") from error


def check(said: LoraOptions, model: nn.Module, layers: Mapping[str, FusedLoraLayer], options: LoraOptions) -> None:
    """What the file says is what was injected into `model` with `options`.  Raises ValueError that names the difference."""
    if said.bias != options.bias:
        raise ValueError(f"{CONFIG_NAME}: bias={said.bias!r}, but the model was injected with bias={options.bias!r}")
    saved, expected = (set(match_modules_to_save(model, some.modules_to_save)) for some in (said, options))
    if saved != expected:
        raise ValueError(
            f"{CONFIG_NAME}: modules_to_save={list(said.modules_to_save)}, but the model was injected with "
            f"{list(options.modules_to_save)}: they differ in {', '.join(sorted(saved ^ expected))}"
        )
    for name, layer in layers.items():
        for option, own in {**layer.of_config(), "use_rslora": layer.use_rslora, "use_dora": layer.use_dora}.items():
            if (value := said.of_layer(name)[option]) != own:
                raise ValueError(f"{CONFIG_NAME}: {option}={value!r}, but the layer {name!r} has {option}={own!r}")
