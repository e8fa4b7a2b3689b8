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
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapter_config
from fastlora.adapter_config import CONFIG_NAME
from fastlora.inject import LoraOptions, install, plan
from fastlora.matching import match_modules_to_save, warn
from fastlora.modules import FusedLoraLinear

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


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
    contents = _contents(model, layers, options)
    _check_loaded(contents)
    config = adapter_config.describe(model, layers, options)
    _warn_unsaved(model, contents.values())
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in contents.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, adapter_config.encode(config))


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
    _check_tensors(model, layers, options, tensors, folder / WEIGHTS_NAME)
    _copy(tensors, model, layers, options)


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
    folder = Path(folder)
    safetensors = _safetensors()
    config = adapter_config.read(folder / CONFIG_NAME)
    tensors = _read(folder / WEIGHTS_NAME, safetensors)
    if adapter_dtype is None:
        adapter_dtype = _common_dtype(model, tensors)
    planned = plan(model, adapter_config.options_of(config, model, adapter_dtype), layer)
    layers = _unique(planned.layers)
    _check_base(layers)
    adapter_config.check(config, model, layers, planned.options)
    _check_tensors(model, layers, planned.options, tensors, folder / WEIGHTS_NAME)
    install(model, planned)
    _copy(tensors, model, layers, planned.options)
    return model if is_trainable else model.requires_grad_(False).eval()


def _eager(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, whose names are the file's."""
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


def _contents(model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None) -> dict[str, Tensor]:
    """The parameters and buffers that the file holds, by key.  `layers` may be planned and not yet installed."""
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


_ADAPTER = ("lora_A", "lora_B")


def _unique(layers: Mapping[str, FusedLoraLinear]) -> dict[str, FusedLoraLinear]:
    """A layer under several names has its tensors in the file once, under the first."""
    names: dict[FusedLoraLinear, str] = {}
    for name, layer in layers.items():
        names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


def _optional(model: nn.Module, layers: Mapping[str, FusedLoraLinear]) -> dict[str, Tensor]:
    """The embeddings' weights, by key: PEFT adds them to the file when they are targets or were resized."""
    embeddings = []
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # a model without embeddings
            embeddings.append(getattr(model, f"get_{side}_embeddings")())
    return {
        f"{_PREFIX}{path}{'.base_layer' if path in layers else ''}.weight": module.weight
        for path, module in model.named_modules(remove_duplicate=False)
        if module in embeddings and isinstance(module.weight, Tensor)
    }


def _ignored(key: str, model: nn.Module, options: LoraOptions | None) -> bool:
    """With bias "all" PEFT also writes the biases of the two copies that it has of a module to save, and does not load them."""
    saved = match_modules_to_save(model, options.modules_to_save) if options and options.bias == "all" else ()
    copies = tuple(f"{_PREFIX}{path}.{copy}." for path in saved for copy in ("original_module", "modules_to_save"))
    return key.startswith(copies) and key.endswith(".bias")


def _check_tensors(
    model: nn.Module,
    layers: Mapping[str, FusedLoraLinear],
    options: LoraOptions | None,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> None:
    """What the file holds is what the model needs, in keys, shapes and dtypes."""
    parameters, optional = _contents(model, layers, options), _optional(model, layers)
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
    _check_loaded(expected)
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


def _copy(
    tensors: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, FusedLoraLinear], options: LoraOptions | None
) -> None:
    """Copy the tensors of the file, which have been checked, to where they belong."""
    parameters = _optional(model, layers) | _contents(model, layers, options)
    with torch.no_grad():
        for key in parameters.keys() & tensors.keys():
            parameters[key].copy_(tensors[key])


def _check_loaded(tensors: Mapping[str, Tensor]) -> None:
    if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"the model is half loaded: {len(meta)} tensors such as {meta[0]!r} are on the meta device")


def _warn_unsaved(model: nn.Module, saved: Iterable[Tensor]) -> None:
    known = set(map(id, saved))
    unsaved = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if unsaved:
        warn(
            f"{len(unsaved)} trainable parameters such as {unsaved[0]!r} are not part of the adapter and are not saved: "
            "name their modules in inject's modules_to_save, or save the model's state_dict as well"
        )


def _common_dtype(model: nn.Module, tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """float32 where the file or a target needs it, otherwise the targets' own dtype."""
    dtypes = set()
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        path, _, name = key.removeprefix(_PREFIX).rpartition(".lora_")
        if name and path in modules and isinstance(weight := getattr(modules[path], "weight", None), Tensor):
            dtypes |= {tensor.dtype, weight.dtype}
    return torch.float32 if dtypes and reduce(torch.promote_types, dtypes) == torch.float32 else None


def _read(path: Path, safetensors: Any) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from error


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
