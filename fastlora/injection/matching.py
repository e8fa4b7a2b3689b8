"""Which modules a LoRA configuration means: PEFT's rules for target_modules, exclude_modules, modules_to_save and patterns.

A name is a module's full path in the model, such as model.layers.0.self_attn.q_proj.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora.injection.layer_types import REPLACED, linear_types, lora_type
from fastlora.injection.options import LoraOptions, compile_regex
from fastlora.injection.walk import named_modules, unwrapped

ALL_LINEAR = "all-linear"

# The heads of timm's and torchvision's models and of transformers' classifiers, none of which says which it is.
_HEADS = {"head", "heads", "head_dist", "fc", "classifier", "score"}


def match_targets(model: nn.Module, target_modules: str | Iterable[str], **options: Any) -> dict[str, nn.Module]:
    """`targets_of` these options of `inject`."""
    return targets_of(model, LoraOptions(target_modules=target_modules, **options))  # type: ignore[arg-type]  # it checks them


def targets_of(model: nn.Module, options: LoraOptions) -> dict[str, nn.Module]:
    """The modules to replace by LoRA layers, by name, in the order of the model.

    Raises ValueError when there is none, TypeError when a match is of a type that `layer_types` does not list: a subclass may
    compute something else, or be read without its forward.
    """
    modules, wanted = _named(model), options.target_modules
    every_linear = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    linears = [name for name, module in modules.items() if isinstance(module, linear_types())]
    if every_linear:
        head = embeddings(model, "output")
        found = [name for name in linears if modules[name] is not head]
    else:
        found = _matching(wanted, "target_modules", modules)
        if options.layers_to_transform not in (None, [], ()):
            found = [name for name in found if name in wanted or _in_layers(name, options)]
    if not found:
        layers = "" if options.layers_to_transform is None else f" with layers_to_transform={options.layers_to_transform!r}"
        last_parts = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
        others = f"; its linears are called {last_parts}" if linears else "; it holds no nn.Linear at all"
        raise ValueError(f"target_modules={wanted!r}{layers} matches no module of the model{near(wanted, linears) or others}")
    excluding = {"exclude_modules": options.exclude_modules, "modules_to_save": options.modules_to_save}
    excluders = [f"{option}={value!r}" for option, value in excluding.items() if value]
    excluded = _excluded(modules, options)
    targets = {name: modules[name] for name in found if name not in excluded}
    uncalled = {name for name, module in targets.items() if type(module) is NonDynamicallyQuantizableLinear}
    if every_linear and uncalled:
        reason = "nn.MultiheadAttention, which reads its weight without calling it, so that an adapter would have no effect"
        warn(f"{ALL_LINEAR!r} leaves out {', '.join(map(repr, sorted(uncalled)))} of {reason}")
        excluders.append("nn.MultiheadAttention")
        targets = {name: module for name, module in targets.items() if name not in uncalled}
    if not targets:
        by = " and ".join(excluders)
        raise ValueError(f"target_modules={wanted!r} matches {len(found)} modules, and {by} excludes all of them")
    if every_linear and (heads := [name for name in targets if name.partition(".")[0] in _HEADS]):
        warn(f"{ALL_LINEAR!r} adapts {heads}, by name the model's head: exclude_modules={heads} leaves it out")
    for name, module in targets.items():
        if lora_type(module) is None:
            raise TypeError(f"target_modules={wanted!r}: {name!r} is a {type(module).__name__}, expected {REPLACED}")
    return targets


def match_modules_to_save(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules to train and save whole: all whose name ends with one of `names`; a shared one under all of its names.

    Raises TypeError for a container, which has no forward of its own, as PEFT does.
    """
    ends = tuple(names)
    found = {name: module for name, module in _named(model).items() if name.endswith(ends)}
    for name, module in found.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            kind = type(module).__name__
            raise TypeError(f"modules_to_save={list(ends)}: {name!r} is a {kind}, expected a module with a forward")
    return found


def near(wanted: str | Iterable[str], names: Iterable[str]) -> str:
    """The end of an error message: the names, or last parts of names, that are nearest to what was asked for."""
    names = list(names)
    choices = [*dict.fromkeys(name.rpartition(".")[2] for name in names), *names]
    wanted = [wanted] if isinstance(wanted, str) else wanted
    found = dict.fromkeys(other for name in wanted for other in get_close_matches(name, choices, n=3, cutoff=0.5))
    return f"; near names: {', '.join(found)}" if found else ""


def embeddings(model: nn.Module, side: str) -> nn.Module | None:
    """The "input" embeddings or the "output" head of a transformers model; None for a model without."""
    get = getattr(unwrapped(model), f"get_{side}_embeddings", None)
    with suppress(AttributeError, NotImplementedError):  # transformers raises these where a model does not name them
        found = get() if callable(get) else None
        return None if found is None else unwrapped(found)
    return None


def warn(message: str) -> None:
    """A UserWarning at the line outside of fastlora that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "fastlora":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """All modules under all of their names, but the root, which has no parent that could hold a replacement."""
    return {name: module for name, module in named_modules(model) if name}


def _matching(names: str | Iterable[str], option: str, modules: Iterable[str]) -> list[str]:
    """The names in `modules` that match: a regex as a whole, or one of a list of full names or ends of names."""
    if isinstance(names, str):
        pattern = compile_regex(names, f"{option}={names!r}")
        return [module for module in modules if pattern.fullmatch(module)]
    ends = tuple(f".{name}" for name in names)
    return [module for module in modules if f".{module}".endswith(ends)]


def _in_layers(name: str, options: LoraOptions) -> bool:
    """Whether the first number in `name`, or the one after a name of layers_pattern, is in layers_to_transform."""
    indices, patterns = options.layers_to_transform, options.layers_pattern or r".*?\.[^.]*"
    for end in [patterns] if isinstance(patterns, str) else patterns:
        start = r"(?:^|.*?\.)" if options.layers_pattern else ""
        if match := compile_regex(rf"{start}{end}\.(?P<index>\d+)\.", f"layers_pattern: {end!r}").match(name):
            return int(match["index"]) in ([indices] if isinstance(indices, int) else indices or ())
    return False


def _excluded(modules: Mapping[str, nn.Module], options: LoraOptions) -> set[str]:
    """What cannot be a target: modules excluded by name, and all that lies in a module to save or bears its name."""
    saved = [compile_regex(rf"(^|.*\.){name}($|\..*)", f"modules_to_save: {name!r}") for name in options.modules_to_save]
    excluded = {name for name in modules if any(pattern.match(name) for pattern in saved)}
    if options.exclude_modules:
        by_name = _matching(options.exclude_modules, "exclude_modules", modules)
        if not by_name:
            hint = near(options.exclude_modules, modules)
            warn(f"exclude_modules={options.exclude_modules!r} excludes no module of the model{hint}")
        excluded.update(by_name)
    return excluded
