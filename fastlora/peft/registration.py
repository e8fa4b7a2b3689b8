"""Accelerated layers from the start, through PEFT's hook for custom modules."""

from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.peft.base import weight_of
from fastlora.peft.layers import fuse, unsupported_reason


class Dispatch:
    """PEFT calls this to wrap an nn.Linear, a Conv1D or a subclass. Returns PEFT's own layer, accelerated.

    It returns None for a quantised linear, and PEFT then uses its layer for that kind. PEFT 0.18 does not pass the config, so
    this object keeps it.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.warned: set[str] = set()

    def __call__(self, target: nn.Module, name: str, config: LoraConfig | None = None, **options: Any) -> nn.Module | None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(weight_of(base_layer), Tensor):
            return None
        layer = dispatch_default(target, name, config or self.config, **options)
        if layer is not None and unsupported_reason(layer) is None:
            fuse(layer, self.warned)
        return layer


def register(lora_config: LoraConfig) -> LoraConfig:
    """See `fastlora.peft.register`."""
    kind = getattr(lora_config, "peft_type", None)
    if not isinstance(lora_config, LoraConfig) or kind != PeftType.LORA:
        raise TypeError(f"lora_config must be a LoraConfig, got {type(lora_config).__name__}" + (f" of {kind}" if kind else ""))
    for cls, other in (lora_config._custom_modules or {}).items():
        if cls in (nn.Linear, Conv1D) and not isinstance(other, Dispatch):
            raise ValueError(f"lora_config has {other!r} registered for {cls.__name__}, which accelerate(model) leaves alone")
    dispatch: Any = Dispatch(lora_config)  # PEFT's hint asks for a class, but PEFT only calls it
    lora_config._register_custom_module({nn.Linear: dispatch, Conv1D: dispatch})
    return lora_config
