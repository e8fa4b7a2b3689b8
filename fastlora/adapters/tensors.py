"""The tensors of an adapter file: which of a model's tensors it holds, under which keys, and whether those of a file fit.

`layers` are a model's LoRA layers by name; `inject` may not have put them in place yet.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import sharded
from fastlora.adapters.config import CONFIG_NAME
from fastlora.injection.matching import embeddings, match_modules_to_save
from fastlora.injection.options import LoraOptions
from fastlora.injection.walk import named_modules, named_parameters
from fastlora.layers.base import FusedLoraLayer

_PREFIX = "base_model.model."


def contents(model: nn.Module, layers: Mapping[str, FusedLoraLayer], options: LoraOptions) -> dict[str, Tensor]:
    """The parameters and buffers that the file holds, by key.  Raises ValueError when one is on the meta device."""
    tensors: dict[str, Tensor] = {}
    for name, _, parameter in named_parameters(model):
        path, _, kind = name.rpartition(".")
        if kind == "bias" and options.bias != "none" and path in layers:
            tensors[f"{path}.base_layer.bias"] = parameter
        elif kind == "bias" and options.bias == "all":
            tensors[name] = parameter
    for path, module in match_modules_to_save(model, options.modules_to_save).items():
        state = module.state_dict(keep_vars=True)
        tensors |= {f"{path}.{name.replace('_orig_mod.', '')}": tensor for name, tensor in state.items()}
    factors = {key: getattr(layer, name) for key, layer, name in _factors(layers)}
    return _loaded(factors | {_PREFIX + key: tensor for key, tensor in tensors.items()})


def embedding_modules(model: nn.Module, layers: Mapping[str, FusedLoraLayer]) -> dict[str, Any]:
    """The model's input and output embeddings, by the keys that PEFT gives their weights."""
    sides = [embeddings(model, side) for side in ("input", "output")]
    found = {name: module for name, module in named_modules(model) if module in sides and isinstance(module.weight, Tensor)}
    return {f"{_PREFIX}{name}{'.base_layer' if name in layers else ''}.weight": module for name, module in found.items()}


def fit(
    model: nn.Module, layers: Mapping[str, FusedLoraLayer], options: LoraOptions, file: Mapping[str, Tensor], path: Path
) -> list[tuple[Tensor, Tensor]]:
    """The model's tensors, each with the file's for it.  Raises ValueError when keys, shapes or dtypes do not fit.

    The file may also hold the weights of the embeddings, which PEFT adds when they are targets or were resized, and with
    bias "all" the biases of PEFT's two copies of a module to save, which PEFT does not load either.
    """
    needed, file = contents(model, layers, options), _from_file(layers, file, path)
    optional = {key: module.weight for key, module in embedding_modules(model, layers).items()}
    saved = match_modules_to_save(model, options.modules_to_save) if options.bias == "all" else ()
    copies = tuple(f"{_PREFIX}{name}.{copy}." for name in saved for copy in ("original_module", "modules_to_save"))
    skipped = {key for key in file if key.startswith(copies) and key.endswith(".bias")}
    differences = {
        "lacks {} keys that this model has": needed.keys() - file.keys(),
        "has {} keys that this model lacks": file.keys() - needed.keys() - optional.keys() - skipped,
    }
    faults = [f"{fault.format(len(keys))}, such as {min(keys)!r}" for fault, keys in differences.items() if keys]
    if faults:
        raise ValueError(f"{str(path)!r} {', and '.join(faults)}")
    tied: dict[Tensor, str] = {}
    pairs = []
    for key, into in _loaded({key: tensor for key, tensor in (optional | needed).items() if key in file}).items():
        tensor = file[key]
        if key not in needed and not torch.equal(file[tied.setdefault(into, key)], tensor):
            raise ValueError(f"{str(path)!r}: {tied[into]!r} and {key!r} differ, but are tied in this model")
        if tensor.shape != into.shape:
            raise ValueError(f"{str(path)!r}: {key!r} has shape {tuple(tensor.shape)}, expected {tuple(into.shape)}")
        widens = tensor.is_floating_point() and torch.promote_types(tensor.dtype, into.dtype) == into.dtype
        if tensor.dtype != into.dtype and not widens:
            raise ValueError(f"{str(path)!r}: {key!r} is {tensor.dtype}, which {into.dtype} cannot hold exactly")
        pairs.append((into, tensor))
    return pairs


def to_file(layers: Mapping[str, FusedLoraLayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of `contents` as the file holds them."""
    converted = dict(tensors)
    for key, layer, name in _factors(layers):
        if key in tensors:  # under FSDP2 the first rank has them
            converted[key] = layer.to_file(name, tensors[key]).contiguous()
    return converted


def _from_file(layers: Mapping[str, FusedLoraLayer], file: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `to_file`.  Raises ValueError for what a layer cannot hold."""
    converted = dict(file)
    for key, layer, name in _factors(layers):
        try:
            if key in file:
                converted[key] = layer.from_file(name, file[key])
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {key!r} {error}") from error
    return converted


def _factors(layers: Mapping[str, FusedLoraLayer]) -> Iterator[tuple[str, FusedLoraLayer, str]]:
    """(key in the file, layer, name of the parameter) of all that the layers train."""
    for path, layer in layers.items():
        for name, key in layer.trained().items():
            yield f"{_PREFIX}{path}.{key}", layer, name


def check_ranks(targets: Iterable[str], options: LoraOptions, file: Mapping[str, Tensor], path: Path) -> None:
    """The file holds factors of the ranks that its config names: layers of a rank that no file has would fill the memory."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    largest = max((len(A) for key, A in file.items() if key.endswith(ends) and A.dim()), default=0)
    for name in targets:
        if (r := options.of_layer(name)["r"]) > largest:
            raise ValueError(f"{CONFIG_NAME}: r={r} for {name!r}, but the largest rank in {str(path)!r} is {largest}")


@torch.no_grad()
def copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the file's tensors to the model's, see `fit`."""
    for into, tensor in pairs:
        into.copy_(sharded.like(tensor, into))


def common_dtype(model: nn.Module, file: Mapping[str, Tensor]) -> torch.dtype | None:
    """float32 where the file or a target needs it, otherwise None for the targets' own dtype."""
    dtypes = set()
    modules = dict(named_modules(model))
    for key, tensor in file.items():
        path, _, name = key.removeprefix(_PREFIX).rpartition(".lora_")
        if name and path in modules and isinstance(weight := getattr(modules[path], "weight", None), Tensor):
            dtypes |= {tensor.dtype, weight.dtype}
    return torch.float32 if dtypes and reduce(torch.promote_types, dtypes) == torch.float32 else None


def _loaded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, none of which is on the meta device, where it would have no values to save or to overwrite."""
    if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"the model is half loaded: {len(meta)} tensors such as {meta[0]!r} are on the meta device")
    return tensors
