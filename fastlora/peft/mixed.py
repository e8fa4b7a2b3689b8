"""`mixed_batch`: one adapter for each entry of a batch, in training too. See `fastlora.peft.mixed_batch`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from fastlora.peft.layers import find

BASE = "__base__"


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """See `fastlora.peft.mixed_batch`."""
    layers = find(model).values()
    check(layers, adapter_names)

    def add_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"adapter_names": list(adapter_names)}

    targets = [module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check(layers: Any, adapter_names: Sequence[str]) -> None:
    """`adapter_names` are names of adapters of these layers, or "__base__"."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list of str, one for each entry of the batch, got {adapter_names!r}")
    if not adapter_names:
        raise ValueError("adapter_names is empty, expected a name for each entry of the batch")
    if wrong := [name for name in adapter_names if not isinstance(name, str)]:
        raise TypeError(f"adapter_names must be a list of str, got {wrong[0]!r} among them")
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(f"adapter_names holds {unknown[0]!r}, expected {', '.join(map(repr, sorted(known)))} or {BASE!r}")
