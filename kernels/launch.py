"""The one place that launches kernels, so that a test or a report can watch every launch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface


class Result(NamedTuple):
    """A tensor that a launch computes.  With parts > 1 the launch writes that many float32 partial sums; sums.py adds them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: int = 1

    def empty(self, device: torch.device) -> Tensor:
        """Memory for the kernel to write: `shape`, or (parts, *shape)."""
        if self.parts == 1:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty((self.parts, *self.shape), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class Plan:
    """The part of a launch that follows from its operands' specs alone.  It is computed once per spec and kept.

    Attributes:
        sizes: the kernel's integer arguments, in its order.
        options: its constexprs, num_warps and num_stages.
        results: what it computes.
        descriptors: (shape, strides, block), perhaps with padding and rounding, of the leading arguments that are descriptors.
        compiled: device index -> (launcher of the compiled kernel, constexprs in the kernel's order).
    """

    kernel: KernelInterface
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    results: tuple[Result, ...] = ()
    descriptors: tuple[tuple[Any, ...], ...] = ()
    compiled: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=dict)


def launch(plan: Plan, *args: Any) -> None:
    """Run the plan's kernel on run-time `args`, in the kernel's order.  An empty grid launches nothing.

    Triton finds the compiled kernel at the first launch.  The plan fixes every integer and alignment that Triton specialises
    on, so later launches call that kernel directly, in an eighth of the host time (benches/NOTES.md).  Profiler hooks still
    see each launch.  Triton's compile-time knobs count at the first launch only.
    """
    if 0 in plan.grid:
        return
    if plan.compiled and (known := plan.compiled.get(torch.cuda.current_device())):
        run, constexprs = known
        run(*args, *constexprs)
        return
    # Triton 3.9 announces that 3.10 turns FP fusion off by default.
    result = plan.kernel[plan.grid](*args, enable_fp_fusion=True, **plan.options)
    if isinstance(result, CompiledKernel):
        constexprs = tuple(plan.options[name] for name in plan.kernel.arg_names[len(args) :])
        plan.compiled[torch.cuda.current_device()] = result[(*plan.grid, 1, 1)[:3]], constexprs
