"""The tensors of an adapter file: what of a model they are, under which keys, and whether those of a file fit.

`layers` are a model's LoRA linears by name; they may be planned and not yet installed. `options` are what it was injected with.
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.injection.matching import embeddings, match_modules_to_save
from fastlora.injection.options import LoraOptions
from fastlora.modules import FusedLoraLinear

_PREFIX = "base_model.model."
_ADAPTER = ("lora_A", "lora_B")


def contents(model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None) -> dict[str, Tensor]:
    """The parameters and buffers that the file holds, by key."""
    tensors: dict[str, Any] = {f"{path}.{name}.weight": getattr(m, name) for path, m in layers.items() for name in _ADAPTER}
    if options and options.bias != "none":
        for name, parameter in model.named_parameters(remove_duplicate=False):
            path, _, kind = name.rpartition(".")
            if kind == "bias" and path in layers:
                tensors[f"{path}.base_layer.bias"] = parameter
            elif kind == "bias" and options.bias == "all":
                tensors[name] = parameter
    for path, module in match_modules_to_save(model, options.modules_to_save if options else ()).items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    return {_PREFIX + key: tensor for key, tensor in tensors.items()}


def _optional(model: nn.Module, layers: Mapping[str, FusedLoraLinear]) -> dict[str, Tensor]:
    """The embeddings' weights, by key: PEFT adds them to the file when they are targets or were resized."""
    both = [embeddings(model, side) for side in ("input", "output")]
    return {
        f"{_PREFIX}{path}{'.base_layer' if path in layers else ''}.weight": module.weight
        for path, module in model.named_modules(remove_duplicate=False)
        if module in both and isinstance(module.weight, Tensor)
    }


def _ignored(key: str, model: nn.Module, options: LoraOptions | None) -> bool:
    """With bias "all" PEFT also writes the biases of the two copies that it has of a module to save, and does not load them."""
    saved = match_modules_to_save(model, options.modules_to_save) if options and options.bias == "all" else ()
    copies = tuple(f"{_PREFIX}{path}.{copy}." for path in saved for copy in ("original_module", "modules_to_save"))
    return key.startswith(copies) and key.endswith(".bias")


def check(
    model: nn.Module,
    layers: Mapping[str, FusedLoraLinear],
    options: LoraOptions | None,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> None:
    """What the file holds is what the model needs, in keys, shapes and dtypes."""
    parameters, optional = contents(model, layers, options), _optional(model, layers)
    missing = sorted(parameters.keys() - tensors.keys())
    unexpected = sorted(
        key for key in tensors.keys() - parameters.keys() - optional.keys() if not _ignored(key, model, options)
    )
    faults = [
        f"{verb} {len(keys)} keys that this model {than}, such as {keys[0]!r}"
        for verb, keys, than in (("lacks", missing, "has"), ("has", unexpected, "lacks"))
        if keys
    ]
    if faults:
        raise ValueError(f"{str(path)!r} {', and '.join(faults)}")
    expected = {key: tensor for key, tensor in (optional | parameters).items() if key in tensors}
    check_loaded(expected)
    first: dict[Tensor, str] = {}
    for key in expected.keys() - parameters.keys():
        other = first.setdefault(expected[key], key)
        if not torch.equal(tensors[other], tensors[key]):
            raise ValueError(f"{str(path)!r}: {other!r} and {key!r} differ, but are tied in this model")
    for key, parameter in expected.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{str(path)!r}: {key!r} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        floating = tensor.is_floating_point() and parameter.is_floating_point()
        if tensor.dtype != parameter.dtype and not (
            floating and torch.promote_types(tensor.dtype, parameter.dtype) == parameter.dtype
        ):
            raise ValueError(f"{str(path)!r}: {key!r} is {tensor.dtype}, which {parameter.dtype} cannot hold exactly")


def copy(
    tensors: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None
) -> None:
    """Copy the tensors of the file, which have been checked, to where they belong."""
    parameters = _optional(model, layers) | contents(model, layers, options)
    with torch.no_grad():
        for key in parameters.keys() & tensors.keys():
            parameters[key].copy_(tensors[key])


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` on the CPU, each in memory of its own: safetensors refuses what is tied."""
    separated, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separated[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separated


def check_loaded(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor is on the meta device, and so has no values to save or to be overwritten."""
    if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"the model is half loaded: {len(meta)} tensors such as {meta[0]!r} are on the meta device")


def common_dtype(model: nn.Module, tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """float32 where the file or a target needs it, otherwise the targets' own dtype."""
    dtypes = set()
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        path, _, name = key.removeprefix(_PREFIX).rpartition(".lora_")
        if name and path in modules and isinstance(weight := getattr(modules[path], "weight", None), Tensor):
            dtypes |= {tensor.dtype, weight.dtype}
    return torch.float32 if dtypes and reduce(torch.promote_types, dtypes) == torch.float32 else None
