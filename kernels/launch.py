"""The one place where a kernel is launched, so that a test or a report can watch every launch."""

from typing import Any

from triton.runtime.jit import KernelInterface


def launch(
    kernel: KernelInterface, grid: tuple[int, ...], args: tuple[Any, ...], *, num_warps: int, num_stages: int, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` with run-time `args` in its own order; an empty grid launches nothing."""
    if 0 in grid:
        return
    # Fused multiply-adds are the default up to Triton 3.9, which announces that 3.10 flips it.
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constexprs)
