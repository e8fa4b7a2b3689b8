"""The modules of a model under their own names: what torch's wrappers put around a module changes no name."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from fastlora.layers.base import FusedLoraLayer
from fastlora.validation import check_model

# By name: torch imports some of them only when they are used.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "OptimizedModule", "CheckpointWrapper", "FullyShardedDataParallel"}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module in a DistributedDataParallel, torch.compile's OptimizedModule and the like, or `module` itself."""
    while any(kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch.") for kind in type(module).__mro__):
        (module,) = module.children()
    return module


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules but wrappers; a shared one under each of its names.  `name` is that of `model`."""
    model = unwrapped(model)
    yield name, model
    for part, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{name}.{part}" if name else part)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, module that holds it, parameter); a shared one under each of its names."""
    for path, module in named_modules(model):
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            yield name, module, parameter


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, and of the wrappers around that module."""
    *path, last = name.split(".")
    parent = unwrapped(model)
    for part in path:
        parent = unwrapped(parent.get_submodule(part))
    setattr(parent, last, new)


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether `tensor` is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


def lora_layers(model: nn.Module) -> dict[FusedLoraLayer, list[str]]:
    """The LoRA layers of `model`, each with all of its names.  Raises TypeError when `model` is no module."""
    check_model(model)
    found: dict[FusedLoraLayer, list[str]] = defaultdict(list)
    for name, module in named_modules(model):
        if isinstance(module, FusedLoraLayer):
            found[module].append(name)
    return found


def some_lora_layers(model: nn.Module, least_rank: int = 0) -> dict[FusedLoraLayer, list[str]]:
    """The `lora_layers` of this rank or a higher one.  Raises ValueError where there is none."""
    if layers := {layer: names for layer, names in lora_layers(model).items() if layer.r >= least_rank}:
        return layers
    raise ValueError("model holds no LoRA layer: call fastlora.inject(model, target_modules=...) first")
