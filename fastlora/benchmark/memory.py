"""Bytes saved for backward, and the most memory held during a step.

Saved bytes are counted where autograd saves them: each storage once, parameters left out.  Peak memory is what torch's
allocator held at most during the step, above what it held before.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], kept_out: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that autograd saves for backward in forward(), each once, without those of `kept_out`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in kept_out if tensor is not None}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # keeps the graph, and with it the storages, alive: no address is used twice
    del result
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held for `device` while step() ran, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for event in sorted(_cpu_allocations(step), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _cpu_allocations(step: Callable[[], object]) -> list[dict]:
    """Every allocation and release of torch's CPU allocator during step(), as the profiler's trace events."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event.get("name") == "[memory]"]
