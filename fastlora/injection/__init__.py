"""LoRA layers in plain models: which modules, putting them in, what is trainable, taking them out again."""

from fastlora.injection.inject import inject
from fastlora.injection.trainable import get_nb_trainable_parameters, print_trainable_parameters
from fastlora.injection.unload import merge_and_unload, unload

__all__ = ["get_nb_trainable_parameters", "inject", "merge_and_unload", "print_trainable_parameters", "unload"]
