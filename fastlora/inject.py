"""`inject`: swap the linears of a model for LoRA linears, by PEFT's rule for which."""

import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora.modules import FusedLoraLinear

ALL_LINEAR = "all-linear"


def inject(
    model: nn.Module,
    *,
    target_modules: str | Iterable[str],
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    layer: type[FusedLoraLinear] = FusedLoraLinear,
) -> nn.Module:
    """Replace every targeted nn.Linear of `model`, in place, by a LoRA linear on the same weight, and freeze all the rest.

    Only the lora_A and lora_B of the new layers are left trainable. A linear that sits in the model under several names is
    replaced by one layer under all of them.

    Args:
        model: any module that holds the linears.
        target_modules: a string is a regular expression that a module's full name must match; a list holds full names or
            ends of names ("q_proj" is "model.layers.0.self_attn.q_proj" too); "all-linear" is every nn.Linear but the
            output head (`model.get_output_embeddings()`, where the model has it) and, with a warning, the out_proj of
            nn.MultiheadAttention, which reads that weight without calling the linear.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype: of every new layer, see `FusedLoraLinear`; r >= 1.
        layer: the class of the new layers.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing matches (the message lists near names), r < 1, a layer's option out of range, `model` holds LoRA
            linears already, or a target sits in an nn.TransformerEncoderLayer while torch's fast path is enabled, which
            computes with the weight alone in evaluation. The model is then unchanged.
        TypeError: a target that is not a plain nn.Linear, or whose weight FusedLoraLinear cannot wrap. The model is unchanged.
    """
    if isinstance(r, int) and r < 1:
        raise ValueError(f"r must be >= 1, got {r}: a model without adapters needs no injection")
    if present := [name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)]:
        raise ValueError(f"model holds {len(present)} LoRA linears already, the first one at {present[0]!r}")
    targets = match_targets(model, target_modules)
    layers = {
        linear: layer.from_linear(linear, r, lora_alpha, lora_dropout, use_rslora=use_rslora, adapter_dtype=adapter_dtype)
        for linear in dict.fromkeys(targets.values())
    }
    model.requires_grad_(False)
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[linear])
    return model


def match_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Linear]:
    """The linears that `target_modules` names, by full name, in the order of the model.

    Raises ValueError when there is none, or one that torch's fast path does not call; TypeError when a match is not a plain
    nn.Linear: a subclass may compute something else, or be read without its forward.
    """
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    # The root has no parent to put a replacement into, and PEFT does not match it either.
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = _output_head(model)
        found = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
        found = _without_attention_outputs(found)
    else:
        matches = _matcher(targets)
        found = {name: module for name, module in modules.items() if matches(name)}
    if not found:
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"target_modules={target_modules!r} matches no module of the model; {_near(targets, linears)}")
    for name, module in found.items():
        if type(module) is not nn.Linear:
            raise TypeError(f"target_modules={target_modules!r}: {name!r} is a {type(module).__name__}, expected nn.Linear")
        parent = name.rpartition(".")[0]
        if isinstance(modules.get(parent, model), nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise ValueError(
                f"target_modules={target_modules!r}: {name!r} sits in an nn.TransformerEncoderLayer, whose fast path would "
                "leave out its adapter in evaluation; call torch.backends.mha.set_fastpath_enabled(False) first"
            )
    return found


def _without_attention_outputs(linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """`linears` but the output projections of nn.MultiheadAttention, which have a class of their own."""
    outputs = [name for name, linear in linears.items() if type(linear) is NonDynamicallyQuantizableLinear]
    if outputs:
        warnings.warn(
            f"{ALL_LINEAR!r} leaves out {', '.join(map(repr, outputs))}: nn.MultiheadAttention reads its weight without "
            "calling it, so that an adapter would have no effect",
            stacklevel=4,  # the caller of inject
        )
    return {name: linear for name, linear in linears.items() if name not in outputs}


def _matcher(targets: str | tuple[str, ...]) -> Callable[[str], bool]:
    if not isinstance(targets, str):
        return lambda name: any(name == target or name.endswith(f".{target}") for target in targets)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"target_modules={targets!r} is not a regular expression: {error}") from error
    return lambda name: pattern.fullmatch(name) is not None


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _near(targets: str | tuple[str, ...], linears: list[str]) -> str:
    """A hint for the error message: the names nearest to what was asked for, else the names there are."""
    if not linears:
        return "it holds no nn.Linear at all"
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = dict.fromkeys(match for target in wanted for match in get_close_matches(target, [*ends, *linears], n=3, cutoff=0.5))
    return f"near names: {', '.join(near)}" if near else f"its linears are called {', '.join(ends)}"
