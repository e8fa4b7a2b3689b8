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
    """What PEFT calls to wrap an nn.Linear or Conv1D, subclasses included: its own layer, accelerated.

    None sends PEFT on to its other layers, so quantised linears get the ones made for them.  PEFT 0.18 does not pass the
    config, hence it is kept here.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.warned: set[str] = set()

    def __call__(
        self, target: nn.Module, adapter_name: str, config: LoraConfig | None = None, **options: Any
    ) -> nn.Module | None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(weight_of(base_layer), Tensor):
            return None
        layer = dispatch_default(target, adapter_name, config or self.config, **options)
        if layer is not None and unsupported_reason(layer) is None:
            fuse(layer, self.warned)
        return layer


def register(lora_config: LoraConfig) -> LoraConfig:
    """See `fastlora.peft.register`."""
    if not isinstance(lora_config, LoraConfig) or lora_config.peft_type != PeftType.LORA:
        kind = getattr(lora_config, "peft_type", None)
        raise TypeError(f"lora_config must be a LoraConfig, got {type(lora_config).__name__}" + (f" of {kind}" if kind else ""))
    registered = lora_config._custom_modules or {}
    for kind in (nn.Linear, Conv1D):
        other = registered.get(kind)
        if other is not None and not isinstance(other, Dispatch):
            raise ValueError(
                f"lora_config has {other!r} registered for {kind.__name__}: accelerate(model) leaves such layers alone"
            )
    dispatch: Any = Dispatch(lora_config)  # PEFT calls what it expects to be a class
    lora_config._register_custom_module({nn.Linear: dispatch, Conv1D: dispatch})
    return lora_config
