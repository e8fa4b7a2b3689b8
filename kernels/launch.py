"""The one place where a kernel is launched, so that a test or a report can watch every launch, and what is planned of one."""

from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import KernelInterface


@dataclass(frozen=True)
class Plan:
    """What of a launch depends on its operands' layouts alone; each launcher works it out once for a layout and keeps it.

    sizes: the kernel's integer arguments in its order.  options: its constexprs, num_warps and num_stages.  blocks: of the
    tensor descriptors, where there are any.
    """

    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    blocks: tuple[list[int], ...] = ()


def launch(
    kernel: KernelInterface, grid: tuple[int, ...], args: tuple[Any, ...], *, num_warps: int, num_stages: int, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` with run-time `args` in its own order; an empty grid launches nothing."""
    if 0 in grid:
        return
    # Fused multiply-adds are the default up to Triton 3.9, which announces that 3.10 flips it.
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constexprs)
