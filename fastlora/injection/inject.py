"""`inject`: swap the linears of a model for LoRA linears and freeze the rest, by PEFT's rules for which and what."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastlora import validation
from fastlora.blocks.sharing import Group
from fastlora.injection import fast_path
from fastlora.injection.layer_types import is_conv1d, linear_types, lora_type
from fastlora.injection.matching import match_modules_to_save, near, targets_of, warn
from fastlora.injection.options import LoraOptions, pattern_matches
from fastlora.injection.walk import is_sharded, lora_layers, named_modules, named_parameters, replace, unwrapped
from fastlora.layers.base import FusedLoraLayer
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import is_quantized, quantize

_DISTRIBUTED = {"DistributedDataParallel", "FullyShardedDataParallel"}
Holders = list[tuple[nn.Module, str]]  # the modules that hold one parameter, with its full name in each


def inject(
    model: nn.Module,
    *,
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    bias: str = "none",
    modules_to_save: Iterable[str] | None = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    fan_in_fan_out: bool | None = None,
    adapter_dtype: torch.dtype | None = None,
    quantize: str | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    layer: type[FusedLoraLinear] = FusedLoraLinear,
    groups: bool = True,
) -> nn.Module:
    """Replace every targeted linear of `model`, in place, by a LoRA linear on the same weight, and freeze all the rest.

    Trainable afterwards: lora_A and lora_B of the new layers, the biases that `bias` names, and the modules to save.
    Parameters keep their identity, so tied ones stay tied.  Only a module to save gets a copy, with a warning, of a parameter
    that it shares with the rest of the model, as in PEFT.  A linear with several matching names is replaced by one layer under
    all of them.

    In evaluation nn.TransformerEncoderLayer has a fast path that reads its linears' weights without calling them: an instance
    that holds new layers is kept out of it.  Other modules that do so, such as torchvision's ShiftedWindowAttention with its
    qkv, cannot be told from outside: leave such linears out of target_modules, or their adapters have no effect.

    Args:
        model: any module that holds the linears.
        target_modules: a string is a regular expression that a module's full name must match; a list holds full names or
            ends of names ("q_proj" matches "model.layers.0.self_attn.q_proj"); "all-linear" is every nn.Linear and
            transformers' Conv1D except the output head (`model.get_output_embeddings()`, where the model has it) and, with a
            warning, the out_proj of nn.MultiheadAttention, which reads that weight without calling the linear.  What is a head
            by its name only, as in timm's models, is adapted, with a warning.
        exclude_modules: modules that are no targets, by the same rule.  It wins over target_modules, as does modules_to_save.
        layers_to_transform: only the layers with these numbers, for names that a list matches by their end.
        layers_pattern: the name before the layer's number, "layers" or "h"; default: the first number in a name.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype: of every new layer, see `FusedLoraLinear`; r >= 1.
        bias: the biases to train: "none", "all" of the model, or "lora_only" those of the new layers.
        modules_to_save: modules whose name ends so are trained whole and saved with the adapter ("classifier", "lm_head").
        rank_pattern, alpha_pattern: {regex that a name or an end of it must match: value}; the first match counts.
        quantize: "nf4" or "fp4" rounds the targets' weights to 4 bits with bitsandbytes (QLoRA).  The new layers are then
            `fastlora.quantized_module.FusedLoraLinear4bit`, as for a target that is a Linear4bit already.
        enable_lora: {regex as in rank_pattern: list of bools} adapts slices of a fused projection, each with factors of its own
            of rank r, as loralib's MergedLinear does: {"c_attn": [True, False, True]} is q and v of GPT-2's attention.
        fan_in_fan_out: follows from the class of each linear; another value given here earns PEFT's warning.
        layer: the class of the new linears.
        groups: compute layers that share x, such as q, k and v, in one step.  They are found in the first training forward
            (`fastlora.blocks.sharing`).

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing matches (the message lists near names) or all is excluded, a module to save does not exist or
            holds a target, an option is out of range, or `model` is sharded, or holds a DistributedDataParallel, LoRA
            linears or PEFT's layers already.
        ImportError: quantize without bitsandbytes.
        TypeError: an option has another type, a target is not of a supported type or has a weight that FusedLoraLinear cannot
            wrap, or a module to save cannot be trained.
        After an error the model is unchanged.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "layer", "groups")}
    validation.check_flag(groups, "groups")
    return install(model, prepare(model, LoraOptions(**given), layer), groups)


@dataclass(frozen=True)
class Injection:
    """What `install` will do to a model.

    layers: the new layers with the names to put them under.  saved: the modules to save by name.  untied: parameters
    that modules to save must not share with the rest, with their holders in modules to save.
    """

    options: LoraOptions
    layers: dict[FusedLoraLayer, list[str]]
    saved: dict[str, nn.Module]
    untied: list[tuple[nn.Parameter, Holders]]


def prepare(model: nn.Module, options: LoraOptions, layer: type[FusedLoraLinear] = FusedLoraLinear) -> Injection:
    """Check everything and make the new layers, without a change to `model`.  Raises what `inject` raises."""
    _check_model(model)
    if not (isinstance(layer, type) and issubclass(layer, FusedLoraLinear)):
        raise TypeError(f"layer must be FusedLoraLinear or a subclass of it, got {layer!r}")
    targets = targets_of(model, options)
    saved = match_modules_to_save(model, options.modules_to_save)
    _check_saved(model, options, targets, saved)
    _check_enable_lora(options, targets)
    _warn_of_no_effect(options, targets)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, linear in targets.items():
        names[linear].append(name)
    layers = {_lora_layer(all_names[0], linear, options, layer): all_names for linear, all_names in names.items()}
    owners: dict[nn.Parameter, Holders] = defaultdict(list)
    for name, module, parameter in named_parameters(model):
        owners[parameter].append((module, name))
    untied = [pair for path, module in saved.items() for pair in _to_untie(path, module, owners)]
    for name, linear in targets.items():
        if others := [other for _, other in owners[linear.get_parameter("weight")] if other.rpartition(".")[0] not in targets]:
            warn(f"the weight of {name!r} is tied to {others[0]!r}: the adapter changes {name!r} alone, merging will untie it")
    return Injection(options, layers, saved, untied)


def install(model: nn.Module, injection: Injection, groups: bool = True) -> nn.Module:
    """Put the new layers in place and set what is trained."""
    for parameter, holders in injection.untied:
        copy = nn.Parameter(parameter.detach().clone())
        for module, name in holders:
            setattr(module, name.rpartition(".")[2], copy)
    model.requires_grad_(False)
    for layer, names in injection.layers.items():
        if isinstance(layer, FusedLoraLinear):
            layer._fastlora_group = Group() if groups else None
        for name in names:
            replace(model, name, layer)
    fast_path.leave(model)
    for module in injection.saved.values():
        module.requires_grad_(True)
    trained = {"none": (), "all": dict(named_modules(model)).values(), "lora_only": injection.layers}[injection.options.bias]
    for module in trained:
        if isinstance(module._parameters.get("bias"), nn.Parameter):
            module.bias.requires_grad_(True)
    unwrapped(model).lora_options = injection.options  # type: ignore[assignment]  # not a submodule: an attribute
    return model


def injected(model: nn.Module) -> list[nn.Module]:
    """The modules in `model`, itself included, that `inject` was called with, without their wrappers."""
    return [module for module in model.modules() if "lora_options" in vars(module)]


def _check_model(model: nn.Module) -> None:
    """`model` has no adapters yet, and is not wrapped by what would not see new ones."""
    layers = lora_layers(model)
    if wrapped := {type(module).__name__ for module in model.modules()} & _DISTRIBUTED:
        raise ValueError(f"model holds a {wrapped.pop()}, which would not reduce new parameters: inject before wrapping")
    if layers:
        raise ValueError(f"model holds {len(layers)} LoRA layers already, the first one at {next(iter(layers.values()))[0]!r}")
    if sharded := [name for name, _, parameter in named_parameters(model) if is_sharded(parameter)]:
        raise ValueError(f"{sharded[0]!r} is sharded, which new parameters would not be: inject before fully_shard")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if of_peft := [name for name, module in named_modules(model) if peft and isinstance(module, peft.BaseTunerLayer)]:
        raise ValueError(f"model holds layers of PEFT's, such as {of_peft[0]!r}: fastlora.accelerate(model) is for those")


def _lora_layer(name: str, module: nn.Module, options: LoraOptions, layer: type[FusedLoraLinear]) -> FusedLoraLayer:
    """The LoRA layer for a target, on its very parameters, which may be tied to others; of class `layer` for a linear."""
    dense = isinstance(module, linear_types()) and not is_quantized(module)
    base = quantize(module, options.quantize) if options.quantize and dense else module
    needed = lora_type(base)
    assert needed is not None  # targets_of has checked it
    if issubclass(needed, FusedLoraLinear) and layer is not FusedLoraLinear:
        if not issubclass(layer, needed):
            raise TypeError(f"layer={layer.__name__} cannot hold a quantised weight, expected a {needed.__name__}")
        needed = layer
    try:
        new = needed.from_module(base, **options.of_layer(name))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name!r}: {error}") from error
    new.weight, new.bias = base.get_parameter("weight"), base._parameters.get("bias")
    return new


def _check_saved(
    model: nn.Module, options: LoraOptions, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> None:
    given = f"modules_to_save={list(options.modules_to_save)}"
    if absent := [name for name in options.modules_to_save if not any(path.endswith(name) for path in saved)]:
        raise ValueError(f"{given}: the model has no {absent[0]!r}{near(absent[0], dict(named_modules(model)))}")
    for path, module in saved.items():
        if inside := [name for name, target in targets.items() if target in set(module.modules())]:
            raise ValueError(
                f"{given}: {path!r} is trained whole, but target_modules matches {inside[0]!r} of it: give modules_to_save "
                f"whole names, or exclude {inside[0]!r}"
            )
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise TypeError(f"modules_to_save: {path}.{name} is {parameter.dtype}, which cannot be trained")


def _check_enable_lora(options: LoraOptions, targets: Mapping[str, nn.Module]) -> None:
    for key in options.enable_lora:
        matched = {name: target for name, target in targets.items() if pattern_matches(key, name)}
        if not matched:
            raise ValueError(f"enable_lora: {key!r} matches no targeted module{near(key, targets)}")
        for name, target in matched.items():
            if not isinstance(target, linear_types()):
                raise TypeError(f"enable_lora: {key!r} matches {name!r}, a {type(target).__name__}, expected a linear")


def _warn_of_no_effect(options: LoraOptions, targets: Mapping[str, nn.Module]) -> None:
    for option, patterns in (("rank_pattern", options.rank_pattern), ("alpha_pattern", options.alpha_pattern)):
        if unmatched := [key for key in patterns if not any(pattern_matches(key, name) for name in targets)]:
            warn(f"{option}: {', '.join(map(repr, unmatched))} matches no targeted module and has no effect")
    given = options.fan_in_fan_out
    linears = [target for target in targets.values() if isinstance(target, linear_types())]
    for kind in sorted({type(linear).__name__ for linear in linears if given is (not is_conv1d(linear))}):
        warn(f"fan_in_fan_out is {given}, but a target is a {kind}: taken as {not given}")


def _to_untie(path: str, saved: nn.Module, owners: dict[nn.Parameter, Holders]) -> list[tuple[nn.Parameter, Holders]]:
    """Each parameter of the module to save that modules outside hold too, with its holders inside.

    They are removed from `owners`: of two tied modules to save, the first gets a copy and the second keeps the original.
    """
    parts, found = set(saved.modules()), []
    for parameter in saved.parameters():
        inside = [holder for holder in owners[parameter] if holder[0] in parts]
        outside = [holder for holder in owners[parameter] if holder[0] not in parts]
        if inside and outside:
            warn(f"modules_to_save: {inside[0][1]!r} is tied to {outside[0][1]!r}; {path!r} gets a copy of its own to train")
            found.append((parameter, inside))
            owners[parameter] = outside
    return found
