"""Bytes saved for backward, and the most memory held during a step.

Saved bytes are counted where autograd saves them: each storage once, without parameters.  Peak memory is the most that torch's
allocator held during the step, less what it held before.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(step: Callable[[], object], parameters: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that autograd saves for backward in step(), each once, without those of `parameters`.

    step: a forward pass, or a forward and a backward pass.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters if tensor is not None}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()  # until all is packed the graph keeps the storages alive: no address is used twice
    del result
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held for `device` while step() ran, less what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # releases are negative
    return max(itertools.accumulate(sizes, initial=0))


def total_bytes(device: torch.device) -> int:
    """Memory of a GPU; on a CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize  # Windows
