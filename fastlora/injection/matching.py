"""Which modules a LoRA configuration means: PEFT's rules for target_modules, exclude_modules, modules_to_save and patterns.

A name is a module's full path in the model, such as model.layers.0.self_attn.q_proj.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora.quantized import is_quantized

ALL_LINEAR = "all-linear"
Value = TypeVar("Value")


def match_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    exclude_modules: str | Iterable[str] | None = None,
    modules_to_save: Sequence[str] = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The linears that become LoRA linears, by name, in the order of the model.

    Each is an nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit.

    Raises ValueError when there is none, or one that torch's fast path does not call; TypeError when a match is another module:
    a subclass may compute something else, or be read without its forward.
    """
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    modules = _named(model)
    every_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    if every_linear:
        head = embeddings(model, "output")
        found = {name for name, module in modules.items() if isinstance(module, _linear_types()) and module is not head}
    else:
        found = set(filter(_matcher(targets, "target_modules"), modules))
        if layers_to_transform not in (None, [], ()):
            found = {name for name in found if name in targets or _in_layers(name, layers_to_transform, layers_pattern)}
    if not found:
        layers = f" with layers_to_transform={layers_to_transform!r}" if layers_to_transform is not None else ""
        raise ValueError(
            f"target_modules={target_modules!r}{layers} matches no module of the model; {_near(targets, linear_names(model))}"
        )
    kept = found - _excluded(modules, exclude_modules, modules_to_save)
    if not kept:
        options = {"exclude_modules": exclude_modules, "modules_to_save": modules_to_save}
        by = " and ".join(f"{option}={value!r}" for option, value in options.items() if value)
        raise ValueError(f"target_modules={target_modules!r} matches {len(found)} modules, and {by} excludes all of them")
    chosen = {name: module for name, module in modules.items() if name in kept}
    if every_linear:
        chosen = _without_attention_outputs(chosen, target_modules)
    for name, module in chosen.items():
        _check_target(name, module, modules.get(name.rpartition(".")[0], model), target_modules)
    return chosen


def match_modules_to_save(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules to train and save whole: all whose name ends with one of `names`; a shared one under all of its names.

    Raises TypeError for a container, which has no forward of its own, as PEFT does.
    """
    ends = tuple(names)
    found = {name: module for name, module in _named(model).items() if ends and name.endswith(ends)}
    for name, module in found.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise TypeError(
                f"modules_to_save={list(ends)}: {name!r} is a {type(module).__name__}, expected a module with a forward"
            )
    return found


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """What rank_pattern or alpha_pattern says of a layer: the first whose key, a regex, matches `name` or an end of it."""
    return next((value for key, value in patterns.items() if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the layer `name`.  Raises ValueError for an invalid regex."""
    return _compile(rf"(.*\.)?({key})$", f"the pattern's key {key!r}").match(name) is not None


def exact_pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern that means the layer `name` and no other."""
    return "^" + re.escape(name)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, GPT-2's linear with a weight stored (in, out)."""
    return isinstance(module, _conv1d())


def linear_names(model: nn.Module) -> list[str]:
    """The names of all linears of `model`."""
    return [name for name, module in _named(model).items() if isinstance(module, _linear_types())]


def near_names(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """The full names and ends of names that are nearest to what was asked for."""
    names = list(names)
    choices = [*dict.fromkeys(name.rpartition(".")[2] for name in names), *names]
    return list(dict.fromkeys(near for name in wanted for near in get_close_matches(name, choices, n=3, cutoff=0.5)))


def warn(message: str) -> None:
    """A UserWarning at the line outside of fastlora that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "fastlora":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """All modules under all of their names, but the root, which has no parent to put a replacement into."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def _conv1d() -> tuple[type[nn.Module], ...]:
    """A model can only hold a Conv1D once transformers has been imported, so there is no need to import it here."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module else ()


def _linear_types() -> tuple[type[nn.Module], ...]:
    return (nn.Linear, *_conv1d())


def _matcher(names: str | Iterable[str], option: str) -> Callable[[str], bool]:
    """A string is a regex that the full name must match; a list holds full names or ends of names."""
    if not isinstance(names, str):
        ends = tuple(names)
        return lambda name: name in ends or name.endswith(tuple(f".{end}" for end in ends))
    pattern = _compile(names, f"{option}={names!r}")
    return lambda name: pattern.fullmatch(name) is not None


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from error


def _in_layers(name: str, indices: int | Sequence[int] | None, patterns: str | Sequence[str] | None) -> bool:
    """Whether the first number in `name`, or the one after a name of `patterns`, is among `indices`."""
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        regexes = (_compile(rf"(?:^|.*?\.){end}\.(?P<index>\d+)\.", f"layers_pattern: {end!r}") for end in names)
        match = next((found for regex in regexes if (found := regex.match(name))), None)
    return match is not None and int(match["index"]) in ([indices] if isinstance(indices, int) else indices or ())


def _excluded(
    modules: Mapping[str, nn.Module], exclude_modules: str | Iterable[str] | None, modules_to_save: Sequence[str]
) -> set[str]:
    """What cannot be a target: modules excluded by name, and all that lies in a module to save or bears its name."""
    saved = [_compile(rf"(^|.*\.){name}($|\..*)", f"modules_to_save: {name!r}") for name in modules_to_save]
    excluded = {name for name in modules if any(pattern.match(name) for pattern in saved)}
    if exclude_modules:
        by_name = set(filter(_matcher(exclude_modules, "exclude_modules"), modules))
        if not by_name:
            near = near_names([exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules), modules)
            hint = f"; near names: {', '.join(near)}" if near else ""
            warn(f"exclude_modules={exclude_modules!r} excludes no module of the model{hint}")
        excluded |= by_name
    return excluded


def _check_target(name: str, module: nn.Module, parent: nn.Module, target_modules: str | Iterable[str]) -> None:
    if type(module) not in _linear_types() and not is_quantized(module):
        expected = "nn.Linear or transformers' Conv1D, or bitsandbytes' Linear4bit"
        raise TypeError(f"target_modules={target_modules!r}: {name!r} is a {type(module).__name__}, expected {expected}")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"target_modules={target_modules!r}: {name!r} sits in an nn.TransformerEncoderLayer, whose fast path would "
            "leave out its adapter in evaluation; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def _without_attention_outputs(linears: dict[str, nn.Module], target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """`linears` but the output projections of nn.MultiheadAttention, which have a class of their own."""
    outputs = [name for name, linear in linears.items() if type(linear) is NonDynamicallyQuantizableLinear]
    if outputs:
        warn(
            f"{ALL_LINEAR!r} leaves out {', '.join(map(repr, outputs))}: nn.MultiheadAttention reads its weight without "
            "calling it, so that an adapter would have no effect"
        )
    kept = {name: linear for name, linear in linears.items() if name not in outputs}
    if not kept:
        raise ValueError(f"target_modules={target_modules!r} matches no module of the model but {', '.join(outputs)}")
    return kept


def embeddings(model: nn.Module, side: str) -> nn.Module | None:
    """The "input" embeddings or the "output" head of a transformers model; None where a model has no such thing."""
    get = getattr(model, f"get_{side}_embeddings", None)
    with suppress(AttributeError, NotImplementedError):  # transformers' answers for a model that does not say where they are
        return get() if callable(get) else None
    return None


def _near(targets: str | tuple[str, ...], linears: list[str]) -> str:
    """A hint for the error message: the names nearest to what was asked for, else the names there are."""
    if not linears:
        return "it holds no nn.Linear at all"
    near = near_names([targets] if isinstance(targets, str) else targets, linears)
    if near:
        return f"near names: {', '.join(near)}"
    return f"its linears are called {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linears))}"
