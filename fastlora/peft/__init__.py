"""Run the LoRA linears of a PEFT model through `lora_linear`, in place.

    report = fastlora.accelerate(model)   # after get_peft_model, PeftModel.from_pretrained, ...
    print(report)                         # how many layers were taken, and why each other layer was left
    fastlora.peft.fallbacks(model)        # which calls since then ran PEFT's forward, and why; {} if none did

Names, parameters, files, merging and switching adapters stay PEFT's own code. An accelerated layer decides at each call. If
it can, it computes the base and the active adapters at once, y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ. Otherwise it runs
PEFT's forward (`fastlora.peft.calls` states the conditions). So adapters may be added, switched, merged or disabled at any
time.
Adapters on the experts of a mixture (`target_parameters`) are computed by `fastlora.peft.experts`.
"""

import dataclasses
import importlib
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from fastlora.peft.report import SMALL, Report
from fastlora.validation import check_flag

__all__ = ["SMALL", "Report", "accelerate", "decelerate", "fallbacks", "mixed_batch", "register", "status"]

OLDEST_PEFT = "0.18"
INSTALL = f"pip install 'peft>={OLDEST_PEFT}'"  # works in a clone as well as beside an installed fastlora


def accelerate(model: nn.Module, *, groups: bool = True, mlp: bool = False) -> Report:
    """Run `model`'s LoRA linears through `fastlora.lora_linear`, in place. `decelerate` undoes it.

    This changes the class of each plain `peft.tuners.lora.layer.Linear`, of PEFT's layers for 4-bit and 8-bit linears of
    bitsandbytes, for weights of experts and for embeddings, and of its pointwise and patch convolutions, to a subclass with
    another `forward`. It changes nothing else. Dropout is PEFT's except for the random numbers: one mask for each projection
    and call, drawn from torch's default generator.

    Args:
        model: a PeftModel, or any module that contains PEFT's LoRA layers.
        groups: compute layers that share x, such as q, k and v, in one step (`fastlora.blocks.sharing`). They are found in the
            first training forward, and again after another `accelerate`.
        mlp: also compute each gated MLP, a module whose forward is down(act(gate(x)) * up(x)), as one step by
            `fastlora.lora_mlp`; its class is changed too. One seed gives the masks of all three linears.

    Returns:
        The status of each layer, and which layers were accelerated before. A warning shows the report if a layer is left, or
        waits for a reason that the user did not choose, such as aLoRA.

    Raises:
        TypeError: model is not an nn.Module, or groups or mlp is not a bool.
        ValueError: model contains no LoRA layer of PEFT.
        ImportError: PEFT is missing, or older than 0.18.
        The model is unchanged after an error.
    """
    layers = _load("layers")
    check_flag(groups, "groups")
    check_flag(mlp, "mlp")
    found = layers.find(model)
    already = tuple(name for name, layer in found.items() if layers.is_fused(layer))
    warned: set[str] = found[already[0]]._fastlora_tally.warned if already else set()
    for layer in [layer for layer in found.values() if layers.unsupported_reason(layer) is None]:
        layers.fuse(layer, warned)
    for layer in filter(layers.is_fused, found.values()):
        layers.share(layer, groups)
    if mlp:
        _load("mlp").attach(model)
    report: Report = _with_mlps(layers.describe(found, already), model, left=mlp)
    if report.left or {reason for _, reason in report.waiting} - _load("calls").INTENDED:
        warnings.warn(str(report), stacklevel=2)
    return report


def decelerate(model: nn.Module) -> int:
    """Give every accelerated layer of `model` its PEFT class back. Returns the number of such layers.

    Raises:
        TypeError, ValueError, ImportError: see `accelerate`.
    """
    layers = _load("layers")
    fused = [layer for layer in layers.find(model).values() if layers.is_fused(layer)]
    _load("mlp").detach(model)
    for layer in fused:
        layers.restore(layer)
    return len(fused)


def status(model: nn.Module) -> Report:
    """The report on `model` as it is now: layers that are accelerated, that wait, and that are left. Changes nothing.

    Raises:
        TypeError, ValueError, ImportError: see `accelerate`.
    """
    layers = _load("layers")
    return _with_mlps(layers.describe(layers.find(model)), model)


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """reason -> layer -> the number of its calls that ran PEFT's forward since the layer was accelerated.

    Under torch.compile a call counts once when it is traced, not each time it runs.

    Raises:
        TypeError, ValueError, ImportError: see `accelerate`.
    """
    layers = _load("layers")
    counts: dict[str, dict[str, int]] = {}
    for name, layer in layers.find(model).items():
        if layers.is_fused(layer):
            for reason, calls in layer._fastlora_tally.fallbacks.items():
                counts.setdefault(reason, {})[name] = calls
    return counts


def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> AbstractContextManager[None]:
    """Within it, entry i of each batch runs through the adapter adapter_names[i] alone, or through none for "__base__".

        with fastlora.peft.mixed_batch(model, ["first", "__base__", "first", "second"]):
            model(**batch).loss.backward()

    It is PEFT's `model(**batch, adapter_names=[...])`, but training works: each adapter gets the gradients of its rows, if its
    parameters require them (`model.base_model.set_adapter(["first", "second"])` makes all of them trainable). Accelerated
    layers multiply with the base weight once for all rows. Backward belongs inside for models that checkpoint activations.
    What is NaN or infinite in the rows of one adapter reaches the gradients of the others, see `fastlora.variants.several`.

    Raises:
        TypeError: adapter_names is not a list of str.
        ValueError: it is empty or names an adapter that no layer has; and in the forward, as in PEFT, a batch of another
            length, merged adapters, or an adapter with DoRA.
        ImportError: see `accelerate`.
    """
    context: AbstractContextManager[None] = _load("mixed").mixed_batch(model, adapter_names)
    return context


def register(lora_config: Any) -> Any:
    """Make PEFT wrap every eligible linear of `lora_config` in an accelerated layer from the start.

        model = get_peft_model(base, fastlora.peft.register(LoraConfig(target_modules=["q_proj"])))

    Linears that `accelerate` would leave, quantised linears and experts get PEFT's own layers. `accelerate` takes the latter
    two afterwards; `status` lists them. PEFT does not save the registration with the config.

    Returns:
        `lora_config` itself.

    Raises:
        TypeError: lora_config is not a LoraConfig, or is for a method with its own layers (AdaLoRA).
        ValueError: another custom module is registered in it for nn.Linear or Conv1D.
        ImportError: see `accelerate`.
    """
    return _load("registration").register(lora_config)


def _with_mlps(report: Report, model: nn.Module, left: bool = False) -> Report:
    """The report with the gated MLPs that are computed as one step, and with `left` those that are not."""
    attached, others = _load("mlp").describe(model, left)
    return dataclasses.replace(report, mlps=attached, mlps_left=others)


def _load(name: str) -> Any:
    """The module fastlora.peft.<name>. It imports peft, an optional package, which `import fastlora` must not import."""
    try:
        import peft
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(f"accelerating PEFT models needs peft, which is missing: {INSTALL}") from error
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(f"accelerating PEFT models needs a newer peft, got {peft.__version__}: {INSTALL}")
    return importlib.import_module(f"fastlora.peft.{name}")
