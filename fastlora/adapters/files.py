"""Adapters on disk, in the format of PEFT: adapter_model.safetensors and adapter_config.json in one folder.

The file holds, each in the dtype it trains in, under base_model.model.<path>, with <path> the name of a module:

    <path>.lora_A.weight (r, in), <path>.lora_B.weight (out, r)   of every LoRA layer
    <path>.lora_magnitude_vector (out,)                           of those with use_dora
    <path>.base_layer.bias                                        of LoRA layers, with bias "lora_only" or "all"
    <path>.bias                                                   of all other modules, with bias "all"
    <path>.<name>                                                 the whole state of the modules to save
    <path>.weight or <path>.base_layer.weight                     of embeddings, where PEFT added them: loaded, and saved again

PEFT's `PeftModel.from_pretrained` reads what `save_adapter` writes, `load_adapter` and `from_pretrained` what PEFT writes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import atomic
from fastlora.adapters import config as adapter_config
from fastlora.adapters import sharded
from fastlora.adapters import tensors as adapter_tensors
from fastlora.adapters.config import CONFIG_NAME
from fastlora.injection.inject import injected, install, prepare
from fastlora.injection.matching import match_modules_to_save, targets_of, warn
from fastlora.injection.options import LoraOptions
from fastlora.injection.walk import named_modules, named_parameters, some_lora_layers, unwrapped
from fastlora.layers.base import FusedLoraLayer
from fastlora.layers.conv import FusedLoraConv
from fastlora.modules import FusedLoraLinear
from fastlora.validation import check_model

WEIGHTS_NAME = "adapter_model.safetensors"

#: Attribute of an embedding whose weight came from an adapter's file, so that the next file holds it too.
_LOADED = "_fastlora_loaded"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what `fastlora.inject` made trainable in `model` to `folder`, which is created when missing.

    `model` may also hold the injected model: in a DistributedDataParallel, a DataParallel, torch.compile's wrapper or a module
    of the user's.  The file has the names in the injected model.

    Both files are written under other names first and then put in place.  A save that is interrupted leaves the old adapter or
    the new one; where their configs differ, it can also leave no config, so that new weights never meet an old config.  A
    trainable parameter that the files do not hold earns a warning.

    Of a model that FSDP2 has sharded, every process makes this call.  What is saved is gathered, tensor by tensor; rank 0
    writes, and the others return when the files are whole.

    Raises:
        ValueError: `model` holds no LoRA layer or several injected models, its layers differ in dropout or scaling rule or are
            on the meta device, or FSDP's first version, DeepSpeed's ZeRO-3 or a mesh of some processes has sharded it.
        RuntimeError: a layer was merged with keep_base=False: on its weight the adapter would count twice; or rank 0, which
            writes for this process, failed.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    base, layers, options = _injected(model)
    contents = adapter_tensors.contents(base, layers, options)
    for key, module in adapter_tensors.embedding_modules(base, layers).items():
        if hasattr(module, _LOADED):
            contents.setdefault(key, module.weight)
    config = adapter_config.describe(base, layers, options)
    _warn_dilated(layers)
    _warn_unsaved(model, contents.values())
    whole, is_collective = sharded.gather(contents)
    tensors = adapter_tensors.to_file(layers, whole)

    def write() -> None:
        weights, text = safetensors.torch.save(tensors, metadata={"format": "pt"}), json.dumps(config, indent=2, sort_keys=True)
        Path(folder).mkdir(parents=True, exist_ok=True)
        atomic.write_together({Path(folder) / WEIGHTS_NAME: weights, Path(folder) / CONFIG_NAME: f"{text}\n".encode()})

    sharded.on_first_rank(write) if is_collective else write()


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read an adapter from `folder` into what `fastlora.inject` prepared in `model`, which may hold it as in `save_adapter`.

    Every key, shape, dtype, rank and scaling is checked before any tensor is changed.  A file of lower precision than the layer
    is cast, one of higher precision refused.  No path inside the config is followed; lora_dropout stays the layer's.  Of a
    model that FSDP2 has sharded, every process makes this call, reads the files and takes its shards of them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, `model` has no LoRA layers or has weights that are still on the meta device, keys
            are missing or unexpected, a shape, dtype, rank or scaling differs, as do the biases or modules to save, or the file
            needs a feature that these layers do not compute, or the parameters are not whole as in `save_adapter`.  The model
            is then unchanged.
        RuntimeError: a layer is merged, so that its weight holds another adapter.  The model is then unchanged.
        ImportError: safetensors is not installed.
    """
    model, layers, options = _injected(model)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"{merged[0]!r} is merged, a new adapter would have no effect on it: unmerge() it first")
    adapter_config.check(adapter_config.read(Path(folder) / CONFIG_NAME), model, layers, options)
    path = Path(folder) / WEIGHTS_NAME
    _load(model, layers, options, _read(path), path)


def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    adapter_dtype: torch.dtype | None = None,
    layer: type[FusedLoraLinear] = FusedLoraLinear,
) -> nn.Module:
    """Inject the adapter of `folder` into a plain `model`, in place, and load it: `PeftModel.from_pretrained` without PEFT.

    Args:
        is_trainable: ready for more training; otherwise, as in PEFT, nothing requires a gradient and the mode is eval().
        adapter_dtype: of lora_A and lora_B; default: what holds both the file's dtype and the targets'.
        layer: the class of the new linears.

    Returns:
        `model` itself.

    Raises:
        What `fastlora.inject` and `load_adapter` raise.  The model is then unchanged.
    """
    check_model(model)
    path = Path(folder) / WEIGHTS_NAME
    said = adapter_config.read(Path(folder) / CONFIG_NAME)
    if not said.target_modules:
        raise ValueError(f"{CONFIG_NAME} names no target_modules")
    file = _read(path)
    # PEFT guesses names of modules to save: those that the model lacks are left out.
    present = [name for name in said.modules_to_save if match_modules_to_save(model, [name])]
    dtype = adapter_dtype or adapter_tensors.common_dtype(model, file)
    options = replace(said, modules_to_save=present, adapter_dtype=dtype)
    adapter_tensors.check_ranks(targets_of(model, options), options, file, path)
    injection = prepare(model, options, layer)
    layers = {names[0]: lora for lora, names in injection.layers.items()}
    adapter_tensors.fit(model, layers, options, file, path)
    install(model, injection)
    _load(model, layers, options, file, path)
    return model if is_trainable else model.requires_grad_(False).eval()


def _load(
    model: nn.Module, layers: dict[str, FusedLoraLayer], options: LoraOptions, file: dict[str, Tensor], path: Path
) -> None:
    _warn_dilated(layers)
    adapter_tensors.copy(adapter_tensors.fit(model, layers, options, file, path))
    for key, module in adapter_tensors.embedding_modules(model, layers).items():
        if key in file:
            setattr(module, _LOADED, True)


def _injected(model: nn.Module) -> tuple[nn.Module, dict[str, FusedLoraLayer], LoraOptions]:
    """The injected module in `model`, its LoRA layers by their first names in it, and what it was injected with."""
    check_model(model)
    base, *others = injected(model) or [unwrapped(model)]
    if others:
        names = [name for name, module in named_modules(model) if module in (base, *others)]
        raise ValueError(f"model holds {len(names)} injected models, {', '.join(map(repr, names))}: pass one of them")
    layers = {names[0]: layer for layer, names in some_lora_layers(base, least_rank=1).items()}
    sharded.reshard(model)
    for path, layer in layers.items():
        for name, expected in zip(layer.FACTORS, layer.factor_shapes, strict=True):
            if (shape := tuple(getattr(getattr(layer, name), "shape", ()))) == expected:
                continue
            raise ValueError(
                f"{name} of {path!r} has shape {shape}, expected {expected}: FSDP's first version and DeepSpeed's ZeRO-3 leave "
                "parts; call this where the parameters are whole, in summon_full_params or GatheredParameters"
            )
        if layer.merged and layer._base_weight is None:
            raise RuntimeError(
                f"{path!r} is merged, and merge(keep_base=False) dropped the base weight that an adapter belongs to: "
                "save before such a merge, load into a new layer on the base weight"
            )
    return base, layers, vars(base).get("lora_options", LoraOptions())


def _warn_dilated(layers: dict[str, FusedLoraLayer]) -> None:
    if dilated := [path for path, layer in layers.items() if isinstance(layer, FusedLoraConv) and layer.is_dilated]:
        warn(f"{dilated[0]!r} has a dilation, which PEFT's lora_A ignores: with PEFT its adapter computes something else")


def _warn_unsaved(model: nn.Module, saved: Iterable[Tensor]) -> None:
    known = set(map(id, saved))
    if unsaved := [name for name, _, p in named_parameters(model) if p.requires_grad and id(p) not in known]:
        warn(
            f"{len(unsaved)} trainable parameters such as {unsaved[0]!r} are not part of the adapter and are not saved: "
            "name their modules in inject's modules_to_save, or save the model's state_dict as well"
        )


def _read(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise FileNotFoundError(f"{str(path)!r} is missing; {pickled.name!r}, a pickle, is never read: save with safetensors")
    try:
        return safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapter files need safetensors: pip install safetensors") from error
    return safetensors
