"""Adapters on disk, in the format of PEFT: adapter_model.safetensors and adapter_config.json in one folder.

The file holds, each in the dtype it trains in, under base_model.model.<path>, with <path> the name of a module:

    <path>.lora_A.weight (r, in), <path>.lora_B.weight (out, r)   of every LoRA linear
    <path>.base_layer.bias                                        of LoRA linears, with bias "lora_only" or "all"
    <path>.bias                                                   of all other modules, with bias "all"
    <path>.<name>                                                 the whole state of the modules to save
    <path>.weight or <path>.base_layer.weight                     of embeddings: where PEFT added them, they are loaded as well

PEFT's `PeftModel.from_pretrained` reads what `save_adapter` writes, `load_adapter` and `from_pretrained` what PEFT writes.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import atomic
from fastlora.adapters import config as adapter_config
from fastlora.adapters import tensors as adapter_tensors
from fastlora.adapters.config import CONFIG_NAME
from fastlora.injection.inject import install, plan
from fastlora.injection.matching import warn
from fastlora.injection.options import LoraOptions
from fastlora.modules import FusedLoraLinear
from fastlora.validation import check_model

WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what `fastlora.inject` made trainable in `model` to `folder`, which is created when missing.

    Each of the two files is written under another name first and then put in place at once: an interrupted save leaves the file
    that was there whole.  A trainable parameter that the files do not hold earns a warning.

    Raises:
        ValueError: `model` holds no LoRA linear, its layers differ in dropout or scaling rule, or are on the meta device.
        RuntimeError: a layer was merged with keep_base=False: on its weight the adapter would count twice.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    model = _eager(model)
    layers = _lora_layers(model)
    _check_base(layers)
    options: LoraOptions | None = getattr(model, "lora_options", None)
    contents = adapter_tensors.contents(model, layers, options)
    adapter_tensors.check_loaded(contents)
    config = adapter_config.describe(model, layers, options)
    _warn_unsaved(model, contents.values())
    tensors = adapter_tensors.separate(contents)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    atomic.write(folder / CONFIG_NAME, adapter_config.encode(config))


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read an adapter from `folder` into what `fastlora.inject` prepared in `model`.

    Every key, shape, dtype, rank and scaling is checked before any tensor is changed.  A file of lower precision than the layer
    is cast, one of higher precision refused.  No path inside the config is followed; lora_dropout stays the layer's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, `model` without LoRA linears or with weights that are still on the meta device,
            keys missing or unexpected, another shape, dtype, rank or scaling, other biases or modules to save, or a feature
            that these layers do not compute.  The model is then unchanged.
        RuntimeError: a layer is merged, so that its weight holds another adapter.  The model is then unchanged.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    safetensors = _safetensors()
    model = _eager(model)
    layers = _lora_layers(model)
    _check_base(layers)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"{merged[0]!r} is merged, a new adapter would have no effect on it: unmerge() it first")
    config = adapter_config.read(folder / CONFIG_NAME)
    options: LoraOptions | None = getattr(model, "lora_options", None)
    adapter_config.check(config, model, layers, options)
    tensors = _read(folder / WEIGHTS_NAME, safetensors)
    adapter_tensors.check(model, layers, options, tensors, folder / WEIGHTS_NAME)
    adapter_tensors.copy(tensors, model, layers, options)


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
        layer: the class of the new layers.

    Returns:
        `model` itself.

    Raises:
        What `fastlora.inject` and `load_adapter` raise.  The model is then unchanged.
    """
    check_model(model)
    folder = Path(folder)
    safetensors = _safetensors()
    config = adapter_config.read(folder / CONFIG_NAME)
    tensors = _read(folder / WEIGHTS_NAME, safetensors)
    if adapter_dtype is None:
        adapter_dtype = adapter_tensors.common_dtype(model, tensors)
    planned = plan(model, adapter_config.options_of(config, model, adapter_dtype), layer)
    layers = _unique(planned.layers)
    _check_base(layers)
    adapter_config.check(config, model, layers, planned.options)
    adapter_tensors.check(model, layers, planned.options, tensors, folder / WEIGHTS_NAME)
    install(model, planned)
    adapter_tensors.copy(tensors, model, layers, planned.options)
    return model if is_trainable else model.requires_grad_(False).eval()


def _eager(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, whose names are the file's."""
    check_model(model)
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


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
        if layer.weight.is_meta:
            raise ValueError(f"the weight of {path!r} is on the meta device: load the base model first")


def _unique(layers: Mapping[str, FusedLoraLinear]) -> dict[str, FusedLoraLinear]:
    """A layer under several names has its tensors in the file once, under the first."""
    names: dict[FusedLoraLinear, str] = {}
    for name, layer in layers.items():
        names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


def _warn_unsaved(model: nn.Module, saved: Iterable[Tensor]) -> None:
    known = set(map(id, saved))
    unsaved = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if unsaved:
        warn(
            f"{len(unsaved)} trainable parameters such as {unsaved[0]!r} are not part of the adapter and are not saved: "
            "name their modules in inject's modules_to_save, or save the model's state_dict as well"
        )


def _read(path: Path, safetensors: Any) -> dict[str, Tensor]:
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
        raise ImportError('adapter files need safetensors: pip install "fastlora[hf]"') from error
    return safetensors
