"""What autograd saves for backward."""

from collections.abc import Callable
from typing import Any

import torch


def saved_by(call: Callable[[], Any]) -> list[torch.Tensor]:
    """The tensors that autograd saves during `call`."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call()
    return saved
