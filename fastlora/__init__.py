"""fastlora: a LoRA linear at the cost of its frozen linear, with dropout, at any shape, with gradients one can trust."""

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapters import from_pretrained, load_adapter, save_adapter
from fastlora.autograd import LoraLinearFunction
from fastlora.dropout import dropout_mask
from fastlora.functional import lora_linear
from fastlora.inject import inject
from fastlora.modules import FusedLoraLinear
from fastlora.peft import accelerate, decelerate
from fastlora.trainable import get_nb_trainable_parameters, print_trainable_parameters
from fastlora.unload import merge_and_unload, unload

__all__ = [
    "FusedLoraLinear",
    "LoraLinearFunction",
    "__version__",
    "accelerate",
    "decelerate",
    "dropout_mask",
    "from_pretrained",
    "get_nb_trainable_parameters",
    "inject",
    "load_adapter",
    "lora_linear",
    "merge_and_unload",
    "print_trainable_parameters",
    "reference",
    "save_adapter",
    "unload",
]
