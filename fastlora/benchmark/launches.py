"""How many launches a step takes: what a GPU runs for it, or on a CPU the operations of torch that do work."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


def launches(step: Callable[[], object], device: torch.device) -> int:
    """On a GPU the kernels, copies and fills that step() launches there; on a CPU its `operations`."""
    if device.type != "cuda":
        return operations(step)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    results: Any = profile.profiler
    on_device = torch.autograd.DeviceType.CUDA
    events = results.kineto_results.events()
    return sum(event.device_type() == on_device and not event.is_user_annotation() for event in events)


def operations(step: Callable[[], object]) -> int:
    """The operations of torch in step(), without views and allocations.

    fastlora's operators count as what they run. torch.compile does not compile in here.
    """
    with _Operations() as found:
        step()
    return found.count


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "fastlora":
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            composite = not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")  # matmul, for example
            if composite and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not is_view and func._schema.name.removeprefix("aten::") not in ALLOCATIONS
        return func(*args, **kwargs)
