"""fastlora: LoRA linears on fused Triton kernels, with dropout, at any shape, with gradients one can trust."""

from fastlora._version import __version__  # first: it refuses a torch that is too old

# isort: split
from fastlora import oracle, reference
from fastlora.adapters import from_pretrained, load_adapter, save_adapter
from fastlora.autograd import LoraLinearFunction
from fastlora.blocks.mlp import lora_mlp
from fastlora.blocks.projections import Projection, lora_linears
from fastlora.functional import dropout_mask, lora_linear
from fastlora.injection import get_nb_trainable_parameters, inject, merge_and_unload, print_trainable_parameters, unload
from fastlora.layers.conv import FusedLoraConv
from fastlora.layers.embedding import FusedLoraEmbedding
from fastlora.modules import FusedLoraLinear
from fastlora.peft import accelerate, decelerate

__all__ = [
    "FusedLoraConv",
    "FusedLoraEmbedding",
    "FusedLoraLinear",
    "LoraLinearFunction",
    "Projection",
    "__version__",
    "accelerate",
    "decelerate",
    "dropout_mask",
    "from_pretrained",
    "get_nb_trainable_parameters",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "merge_and_unload",
    "oracle",
    "print_trainable_parameters",
    "reference",
    "save_adapter",
    "unload",
]
