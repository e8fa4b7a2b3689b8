"""The types of layer that `inject` replaces, and by what.  A new type is added here: nothing else lists them."""

import sys

from torch import nn

from fastlora.layers.base import FusedLoraLayer
from fastlora.layers.conv import FusedLoraConv
from fastlora.layers.embedding import FusedLoraEmbedding
from fastlora.modules import FusedLoraLinear
from fastlora.quantized import is_quantized
from fastlora.quantized_module import FusedLoraLinear4bit

_LORA_TYPES: dict[type[nn.Module], type[FusedLoraLayer]] = {
    nn.Embedding: FusedLoraEmbedding,
    nn.Conv1d: FusedLoraConv,
    nn.Conv2d: FusedLoraConv,
    nn.Conv3d: FusedLoraConv,
}

#: What `lora_type` replaces, as error messages say it.
REPLACED = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, transformers' Conv1D or bitsandbytes' Linear4bit"


def linear_types() -> tuple[type[nn.Module], ...]:
    """What "all-linear" means: nn.Linear and transformers' Conv1D, without importing transformers."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, module.Conv1D) if module else (nn.Linear,)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, GPT-2's linear with a weight stored (in, out)."""
    return isinstance(module, linear_types()[1:])


def lora_type(module: nn.Module) -> type[FusedLoraLayer] | None:
    """The class of LoRA layer that can replace `module`; None for a subclass, which may compute something else."""
    if is_quantized(module):
        return FusedLoraLinear4bit
    return FusedLoraLinear if type(module) in linear_types() else _LORA_TYPES.get(type(module))
