"""The one place where a kernel is launched, so that a test or a report can watch every launch, and what is planned of one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface


class Result(NamedTuple):
    """A tensor that a launch computes; with parts > 1 as so many partial sums of it in float32, which sums.py adds up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: int = 1

    def empty(self, device: torch.device) -> Tensor:
        """Memory for the kernel to write: the tensor's, or (parts, *shape)."""
        if self.parts == 1:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty((self.parts, *self.shape), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class Plan:
    """What of a launch depends on its operands' layouts alone: worked out once for a layout, and kept.

    sizes: the kernel's integer arguments in its order.  options: its constexprs, num_warps and num_stages.  results: what it
    computes.  descriptors: (shape, strides, block) of those that the first arguments are handed in, where they are.  ready: by
    device, the kernel compiled for it and its constexprs in order.
    """

    kernel: KernelInterface
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    results: tuple[Result, ...] = ()
    descriptors: tuple[tuple[list[int], list[int], list[int]], ...] = ()
    ready: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=dict)


def launch(plan: Plan, *args: Any) -> None:
    """Run the plan's kernel with run-time `args` in its own order; an empty grid launches nothing.

    The plan fixes the integers and alignments that a kernel is compiled for, so Triton finds the compiled one once; afterwards
    it is launched as it is, for an eighth of the host's time (benches/NOTES.md).  A profiler's hooks still see it; knobs that
    change how a kernel is compiled count at its first launch.
    """
    if 0 in plan.grid:
        return
    if plan.ready and (known := plan.ready.get(torch.cuda.current_device())):
        run, values = known
        run(*args, *values)
        return
    # Fused multiply-adds are the default up to Triton 3.9, which announces that 3.10 flips it.
    result = plan.kernel[plan.grid](*args, enable_fp_fusion=True, **plan.options)
    if isinstance(result, CompiledKernel):
        values = tuple(plan.options[name] for name in plan.kernel.arg_names[len(args) :])
        plan.ready[torch.cuda.current_device()] = result[(*plan.grid, 1, 1)[:3]], values
