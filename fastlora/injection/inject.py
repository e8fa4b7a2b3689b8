"""`inject`: swap the linears of a model for LoRA linears and freeze the rest, by PEFT's rules for which and what."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.injection.matching import (
    is_conv1d,
    match_modules_to_save,
    match_targets,
    near_names,
    pattern_matches,
    pattern_value,
    warn,
)
from fastlora.injection.options import LoraOptions, listed, values_by_regex
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import is_quantized, quantize
from fastlora.quantized_module import FusedLoraLinear4bit
from fastlora.validation import check_model

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
    fan_in_fan_out: bool | None = None,
    adapter_dtype: torch.dtype | None = None,
    quantize: str | None = None,
    layer: type[FusedLoraLinear] = FusedLoraLinear,
) -> nn.Module:
    """Replace every targeted linear of `model`, in place, by a LoRA linear on the same weight, and freeze all the rest.

    Left trainable: lora_A and lora_B of the new layers, the biases that `bias` names, and the modules to save.  Parameters keep
    their identity, so what was tied stays tied, but for a module to save: a parameter that it shares with the rest of the model
    is copied first, with a warning, as PEFT does.  A linear that sits in the model under several matching names is replaced by
    one layer under all of them.

    Args:
        model: any module that holds the linears.
        target_modules: a string is a regular expression that a module's full name must match; a list holds full names or
            ends of names ("q_proj" is "model.layers.0.self_attn.q_proj" too); "all-linear" is every nn.Linear and transformers'
            Conv1D but the output head (`model.get_output_embeddings()`, where the model has it) and, with a warning, the
            out_proj of nn.MultiheadAttention, which reads that weight without calling the linear.
        exclude_modules: what is no target, by the same rule; looked at first, as is modules_to_save.
        layers_to_transform: only the layers with these numbers, for names that a list matches by their end.
        layers_pattern: the name that the layer's number follows, "layers" or "h"; default: the first number in a name.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype: of every new layer, see `FusedLoraLinear`; r >= 1.
        bias: the biases to train: "none", "all" of the model, or "lora_only" those of the new layers.
        modules_to_save: modules whose name ends so are trained whole and saved with the adapter ("classifier", "lm_head").
        rank_pattern, alpha_pattern: {regex that a name or an end of it must match: value}, the first that matches.
        quantize: "nf4" or "fp4" rounds the targets' weights to 4 bits with bitsandbytes (QLoRA), which makes the new layers
            `fastlora.quantized_module.FusedLoraLinear4bit`, as a target that is a Linear4bit already does.
        fan_in_fan_out: follows from the class of each linear; another value given here earns PEFT's warning.
        layer: the class of the new layers.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing matches (the message lists near names) or all is excluded, a module to save that does not exist or
            holds a target, an option out of range, `model` holds LoRA linears or layers of PEFT's already, or a target sits in
            an nn.TransformerEncoderLayer while torch's fast path is on, which computes with the weight alone in evaluation.
        ImportError: quantize without bitsandbytes.
        TypeError: an option of another type, a target that is neither a plain nn.Linear nor a Conv1D nor a Linear4bit, or whose
            weight FusedLoraLinear cannot wrap, a module to save that cannot be trained.
        After an error the model is unchanged.
    """
    options = LoraOptions(
        target_modules=listed(target_modules, "target_modules"),
        exclude_modules=None if exclude_modules is None else listed(exclude_modules, "exclude_modules"),
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        modules_to_save=listed(modules_to_save or (), "modules_to_save"),
        rank_pattern=values_by_regex(rank_pattern, "rank_pattern"),
        alpha_pattern=values_by_regex(alpha_pattern, "alpha_pattern"),
        use_rslora=use_rslora,
        fan_in_fan_out=fan_in_fan_out,
        adapter_dtype=adapter_dtype,
        quantize=quantize,
    )
    return install(model, plan(model, options, layer))


@dataclass(frozen=True)
class Plan:
    """What `install` will do to a model: new layers and modules to save, by name, and what of those is to be untied first."""

    options: LoraOptions
    layers: dict[str, FusedLoraLinear]
    saved: dict[str, nn.Module]
    untied: list[Holders]


def plan(model: nn.Module, options: LoraOptions, layer: type[FusedLoraLinear] = FusedLoraLinear) -> Plan:
    """Check everything and make the new layers, without a change to `model`.  Raises what `inject` raises."""
    check_model(model)
    if not (isinstance(layer, type) and issubclass(layer, FusedLoraLinear)):
        raise TypeError(f"layer must be FusedLoraLinear or a subclass of it, got {layer!r}")
    if present := [name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)]:
        raise ValueError(f"model holds {len(present)} LoRA linears already, the first one at {present[0]!r}")
    if present := [name for name, module in model.named_modules() if _is_of_peft(module)]:
        raise ValueError(f"model holds layers of PEFT's, such as {present[0]!r}: fastlora.accelerate(model) is for those")
    targets = match_targets(
        model,
        options.target_modules,
        exclude_modules=options.exclude_modules,
        modules_to_save=options.modules_to_save,
        layers_to_transform=options.layers_to_transform,
        layers_pattern=options.layers_pattern,
    )
    saved = match_modules_to_save(model, options.modules_to_save)
    _check_saved(model, options, targets, saved)
    _check_patterns(options, targets)
    made: dict[nn.Module, FusedLoraLinear] = {}
    for name, linear in targets.items():
        if linear not in made:
            base = _base(linear, options.quantize)
            made[linear] = _class_on(base, layer).from_linear(
                base,
                pattern_value(options.rank_pattern, name, options.r),
                pattern_value(options.alpha_pattern, name, options.lora_alpha),
                options.lora_dropout,
                use_rslora=options.use_rslora,
                fan_in_fan_out=is_conv1d(linear),
                adapter_dtype=options.adapter_dtype,
            )
    owners = _owners(model)
    untied = [holders for path, module in saved.items() for holders in _to_untie(path, module, owners)]
    for name, linear in targets.items():
        if others := [other for _, other in owners[linear.get_parameter("weight")] if other.rpartition(".")[0] not in targets]:
            warn(f"the weight of {name!r} is tied to {others[0]!r}: the adapter changes {name!r} alone, merging will untie it")
    return Plan(options, {name: made[linear] for name, linear in targets.items()}, saved, untied)


def install(model: nn.Module, plan: Plan) -> nn.Module:
    """Put the layers of `plan` in place and set what is trained."""
    for holders in plan.untied:
        module, name = holders[0]
        copy = nn.Parameter(module.get_parameter(name.rpartition(".")[2]).detach().clone())
        for module, name in holders:
            setattr(module, name.rpartition(".")[2], copy)
    model.requires_grad_(False)
    for name, layer in plan.layers.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        # The same Parameters, which may be tied to others.
        if is_quantized(linear) or not isinstance(layer, FusedLoraLinear4bit):
            layer.weight = linear.get_parameter("weight")
        layer.bias = linear._parameters["bias"]
        setattr(model.get_submodule(parent), child, layer)
    for module in plan.saved.values():
        module.requires_grad_(True)
    for parameter in _trained_biases(model, plan.options.bias, plan.layers):
        parameter.requires_grad_(True)
    model.lora_options = plan.options  # type: ignore[assignment]  # not a submodule: an attribute for save_adapter
    return model


def _is_of_peft(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def _base(linear: nn.Module, kind: str | None) -> nn.Module:
    """`linear`, or what quantising it gives."""
    return linear if kind is None or is_quantized(linear) else quantize(linear, kind)


def _class_on(base: nn.Module, layer: type[FusedLoraLinear]) -> type[FusedLoraLinear]:
    """The class of the new layer on `base`."""
    if not is_quantized(base):
        return layer
    if layer is not FusedLoraLinear and not issubclass(layer, FusedLoraLinear4bit):
        raise TypeError(f"layer={layer.__name__} cannot hold a quantised weight, expected a FusedLoraLinear4bit")
    return layer if issubclass(layer, FusedLoraLinear4bit) else FusedLoraLinear4bit


def _trained_biases(model: nn.Module, bias: str, layers: Mapping[str, FusedLoraLinear]) -> list[nn.Parameter]:
    if bias == "lora_only":
        return [layer.bias for layer in layers.values() if layer.bias is not None]
    named = model.named_parameters() if bias == "all" else ()
    return [parameter for name, parameter in named if name.rpartition(".")[2] == "bias"]


def _check_saved(
    model: nn.Module, options: LoraOptions, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> None:
    for name in options.modules_to_save:
        if not any(path.endswith(name) for path in saved):
            near = near_names([name], [path for path, _ in model.named_modules() if path])
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise ValueError(f"modules_to_save={list(options.modules_to_save)}: the model has no {name!r}{hint}")
    for path, module in saved.items():
        inside = [name for name, target in targets.items() if any(target is part for part in module.modules())]
        if inside:
            raise ValueError(
                f"modules_to_save={list(options.modules_to_save)}: {path!r} is trained whole, but target_modules matches "
                f"{inside[0]!r} of it: give modules_to_save whole names, or exclude {inside[0]!r}"
            )
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise TypeError(f"modules_to_save: {path}.{name} is {parameter.dtype}, which cannot be trained")


def _check_patterns(options: LoraOptions, targets: Mapping[str, nn.Module]) -> None:
    for option, patterns in (("rank_pattern", options.rank_pattern), ("alpha_pattern", options.alpha_pattern)):
        unmatched = [key for key in patterns if not any(pattern_matches(key, name) for name in targets)]
        if unmatched:
            warn(f"{option}: {', '.join(map(repr, unmatched))} matches no targeted module and has no effect")
    for kind in sorted(
        {type(linear).__name__ for linear in targets.values() if options.fan_in_fan_out is (not is_conv1d(linear))}
    ):
        warn(f"fan_in_fan_out is {options.fan_in_fan_out}, but a target is a {kind}: taken as {not options.fan_in_fan_out}")


def _owners(model: nn.Module) -> dict[nn.Parameter, Holders]:
    """Where each parameter is."""
    owners = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, f"{path}.{name}" if path else name))
    return owners


def _to_untie(path: str, saved: nn.Module, owners: dict[nn.Parameter, Holders]) -> list[Holders]:
    """What in `saved` holds parameters that other modules hold too, so that training a copy leaves those alone.

    `owners` then no longer counts it: where two modules to save are tied, the first gets a copy.
    """
    parts, found = set(saved.modules()), []
    for parameter in saved.parameters():
        inside: Holders = []
        outside: Holders = []
        for module, name in owners[parameter]:
            (inside if module in parts else outside).append((module, name))
        if inside and outside:
            warn(f"modules_to_save: {inside[0][1]!r} is tied to {outside[0][1]!r}; {path!r} gets a copy of its own to train")
            found.append(inside)
            owners[parameter] = outside
    return found
