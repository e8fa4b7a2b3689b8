"""PEFT models run through `lora_linear`, in place: names, parameters, files, merging and switching stay PEFT's own code.

    report = fastlora.accelerate(model)   # after get_peft_model, PeftModel.from_pretrained, ...
    print(report)                         # how many layers were taken, and why each other one was not
    fastlora.peft.fallbacks(model)        # {} as long as every call since then was fused

An accelerated layer decides call by call.  It computes y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ at once where exactly one
plain adapter is active, and calls PEFT's forward otherwise (`fastlora.peft.calls` states the conditions), so adapters that are
added, switched, merged or disabled later just work.

The installed PEFT is imported when a function is called, not with this module.
"""

import warnings
from typing import Any

from torch import nn

from fastlora.peft.report import Report

__all__ = ["Report", "accelerate", "decelerate", "fallbacks", "register", "status"]

OLDEST_PEFT = "0.18"


def accelerate(model: nn.Module) -> Report:
    """Let `model`'s LoRA linears run through `fastlora.lora_linear`, in place; `decelerate` undoes it.

    Of each plain `peft.tuners.lora.layer.Linear`, and of PEFT's like for 4-bit and 8-bit linears of bitsandbytes, only the
    class changes, to a subclass with another `forward`.  Dropout is PEFT's but for the random numbers: one mask per projection
    and call, drawn from torch's default generator.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.

    Returns:
        The layers taken, and the name and reason of each other one.  Layers already accelerated count among the latter; for
        any other that is left there is a warning with the whole report.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model holds no LoRA layer of PEFT's.
        ImportError: PEFT is missing, or older than 0.18.
        The model is then unchanged.
    """
    _require_peft()
    from fastlora.peft import layers

    found = layers.find(model)
    reasons = {name: layers.unsupported_reason(layer) for name, layer in found.items()}
    outcome = layers.describe(found, reasons)
    warned = layers.shared_warnings(found.values())
    for name, layer in found.items():
        if reasons[name] is None:
            layers.fuse(layer, warned)
    if not all(layers.is_fused(layer) for layer in found.values()):
        warnings.warn(str(outcome), stacklevel=2)
    return outcome


def decelerate(model: nn.Module) -> int:
    """Give every accelerated layer of `model` PEFT's own class back; returns how many there were.

    Raises:
        TypeError, ValueError, ImportError: as `accelerate`.
    """
    _require_peft()
    from fastlora.peft import layers

    fused = [layer for layer in layers.find(model).values() if layers.is_fused(layer)]
    for layer in fused:
        layers.restore(layer)
    return len(fused)


def status(model: nn.Module) -> Report:
    """The layers of `model` that are accelerated as it stands, those that wait, and those that are left; changes nothing.

    Raises:
        TypeError, ValueError, ImportError: as `accelerate`.
    """
    _require_peft()
    from fastlora.peft import layers

    found = layers.find(model)
    reasons = {
        name: None if layers.is_fused(layer) else layers.unsupported_reason(layer) or "not accelerated"
        for name, layer in found.items()
    }
    return layers.describe(found, reasons)


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """reason -> layer -> how many of its calls took PEFT's forward since it was accelerated.

    What torch.compile traced counts once per trace, not per run.

    Raises:
        TypeError, ValueError, ImportError: as `accelerate`.
    """
    _require_peft()
    from fastlora.peft import layers

    counts: dict[str, dict[str, int]] = {}
    for name, layer in layers.find(model).items():
        if layers.is_fused(layer):
            for reason, calls in layers.tally_of(layer).fallbacks.items():
                counts.setdefault(reason, {})[name] = calls
    return counts


def register(lora_config: Any) -> Any:
    """Let every eligible linear that PEFT wraps with `lora_config` be an accelerated layer from the start.

        model = get_peft_model(base, fastlora.peft.register(LoraConfig(target_modules=["q_proj"])))

    Linears that `accelerate` would leave go PEFT's own way, as do quantised ones, which `accelerate` takes afterwards; `status`
    lists them.  The registration lives in this config object: it is not saved with it.

    Returns:
        `lora_config` itself.

    Raises:
        TypeError: lora_config is no LoraConfig, or one of a method with layers of its own (AdaLoRA).
        ValueError: it has another custom module registered for nn.Linear or Conv1D.
        ImportError: as `accelerate`.
    """
    _require_peft()
    from fastlora.peft import registration

    return registration.register(lora_config)


def _require_peft() -> None:
    try:
        import peft
        from packaging.version import Version
    except ImportError as error:
        raise ImportError('accelerating PEFT models needs peft: pip install "fastlora[hf]"') from error
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(f"accelerating PEFT models needs peft >= {OLDEST_PEFT}, but peft {peft.__version__} is installed")
