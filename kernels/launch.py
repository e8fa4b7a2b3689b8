"""The one place where a kernel is launched, so that a test or a report can watch every launch, and what is planned of one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface

Ready = dict[int, tuple[CompiledKernel, tuple[Any, ...]]]


@dataclass(frozen=True)
class Plan:
    """What of a launch depends on its operands' layouts alone; each launcher works it out once for a layout and keeps it.

    sizes: the kernel's integer arguments in its order.  options: its constexprs, num_warps and num_stages.  blocks: of the
    tensor descriptors, where there are any.  ready: by device, the kernel compiled for it and its constexprs in order.
    """

    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    blocks: tuple[list[int], ...] = ()
    ready: Ready = field(default_factory=dict, compare=False)


def launch(
    kernel: KernelInterface,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    *,
    num_warps: int,
    num_stages: int,
    ready: Ready | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid` with run-time `args` in its own order; an empty grid launches nothing.

    With `ready`, which must belong to a plan that fixes the integers and the alignments in `args`, Triton finds the compiled
    kernel once: afterwards it is launched as it is, for a quarter of the host's time (benches/NOTES.md).
    """
    if 0 in grid:
        return
    if ready and (known := ready.get(torch.cuda.current_device())):
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*args, *values)
        return
    # Fused multiply-adds are the default up to Triton 3.9, which announces that 3.10 flips it.
    result = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constexprs)
    if ready is not None and isinstance(result, CompiledKernel):
        ready[torch.cuda.current_device()] = result, tuple(constexprs[name] for name in kernel.arg_names[len(args) :])
