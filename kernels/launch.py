"""The one place that launches kernels, so that a test or a report can watch every launch."""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

# The versions of Triton whose launchers were read and compared with `_direct`, byte for byte (tests/compile/test_launch.py).
KNOWN_LAUNCHERS = ("3.6", "3.7", "3.8", "3.9")
DESCRIPTORS = 1024  # kept for each plan: some 0.5 KiB each; a training step has as many as the model has layers of one shape

Run = Callable[[tuple[Any, ...]], None]


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
        compiled: device index -> two functions that launch the compiled kernel on run-time arguments: `_direct`'s, if it has
            one, and Triton's.
    """

    kernel: KernelInterface
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]
    results: tuple[Result, ...] = ()
    descriptors: tuple[tuple[Any, ...], ...] = ()
    compiled: dict[int, tuple[Run | None, Run]] = field(default_factory=dict)


def launch(plan: Plan, *args: Any) -> None:
    """Run the plan's kernel on run-time `args`, tensors and numbers in the kernel's order.  An empty grid launches nothing.

    Triton finds the compiled kernel at the first launch.  The plan fixes every integer and alignment that Triton specialises
    on, so later launches hand their arguments to the C function of Triton's launcher, in a thirteenth of the host time, or,
    while a profiler's hook is set and where `_direct` knows no better, to Triton's compiled kernel, in a quarter of it
    (benches/NOTES.md).  Triton's compile-time knobs count at the first launch only.
    """
    if plan.compiled and (known := plan.compiled.get(torch.cuda.current_device())):
        direct, by_triton = known
        (by_triton if direct is None or _hooked() else direct)(args)
        return
    if 0 in plan.grid:
        return
    # Triton 3.9 announces that 3.10 turns FP fusion off by default.
    result = plan.kernel[plan.grid](*_described(plan, args), enable_fp_fusion=True, **plan.options)
    if isinstance(result, CompiledKernel):  # not under the interpreter
        device = torch.cuda.current_device()
        constexprs = tuple(plan.options[name] for name in plan.kernel.arg_names[len(args) :])
        run = result[(*plan.grid, 1, 1)[:3]]
        direct = _direct(plan, result, device, constexprs)
        plan.compiled[device] = direct, lambda args: run(*_described(plan, args), *constexprs)


def _described(plan: Plan, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with tensor descriptors where the kernel takes them."""
    described = (TensorDescriptor(matrix, *facts) for matrix, facts in zip(args, plan.descriptors, strict=False))
    return (*described, *args[len(plan.descriptors) :])


def _hooked() -> bool:
    """Whether a hook wants to see launches.  A chain of hooks lists its `calls`."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _direct(plan: Plan, kernel: CompiledKernel, device: int, constexprs: tuple[Any, ...]) -> Run | None:
    """What hands run-time arguments to the C function of Triton's launcher, as Triton would; None where only Triton can.

    The launcher is called once with placeholders and a stand-in for the C function, which sees what is handed over: the grid,
    the stream, facts of the kernel, and the arguments, as one sequence from Triton 3.7 on.  Scratch memory, instrumentation,
    another launcher than NVIDIA's and an unknown Triton are left to Triton.
    """
    launcher, module, metadata = kernel.run, sys.modules[type(kernel.run).__module__], kernel.metadata
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN_LAUNCHERS or module.__name__ != "triton.backends.nvidia.driver":
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.instrumentation_mode:
        return None
    c_launch, handed = launcher.launch, []
    if plan.descriptors:  # Triton's wrapper makes the descriptors
        c_launch = inspect.getclosurevars(c_launch).nonlocals.get("launcher")
    asked = copy.copy(launcher)
    asked.launch = lambda *args: handed.extend(args)
    grid, stream, argument = (*plan.grid, 1, 1)[:3], object(), object()
    asked(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, argument)
    facts, in_sequence = handed[4:-1], handed[-1] == (argument,)
    understood = handed[:4] == [*grid, stream] and (in_sequence or handed[-1] is argument)
    if not understood or not isinstance(c_launch, BuiltinFunctionType):
        return None
    current_stream = driver.active.get_current_stream

    def run(args: tuple[Any, ...]) -> None:
        arguments = args + constexprs
        c_launch(*grid, current_stream(device), *facts, *((arguments,) if in_sequence else arguments))

    if not plan.descriptors:
        return run

    unread = (None,) * (len(inspect.signature(module.make_tensordesc_arg).parameters) - 2)  # one, from Triton 3.8 on
    # Address -> what the C function takes, for each descriptor.  The plan fixes the shape, strides, type and block.
    known: tuple[dict[int, list[Any]], ...] = tuple({} for _ in plan.descriptors)

    def describe(index: int, matrix: Tensor) -> list[Any]:
        if len(known[index]) == DESCRIPTORS:
            known[index].clear()
        described = TensorDescriptor(matrix, *plan.descriptors[index])
        made = known[index][matrix.data_ptr()] = module.make_tensordesc_arg(described, metadata.tensordesc_meta[index], *unread)
        return made

    def run_described(args: tuple[Any, ...]) -> None:
        operands: list[Any] = []
        for index, made in enumerate(known):
            operands += made.get(args[index].data_ptr()) or describe(index, args[index])
        run((*operands, *args[len(known) :]))

    return run_described
