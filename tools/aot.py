"""Compile the package's real launches for a GPU that is not there.

Every launch of the package goes through `fastlora.kernels.launch.launch`. Inside `offline(capability)` that function is handed
kernels that compile where they would run, for the very arguments of the launch: Triton's own `warmup` derives the signature,
the divisibility of pointers and integers, the arguments equal to one and the tensor descriptors, so nothing is restated here.
The tensors may live on the meta device; results land in Triton's on-disk cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import launch as launching


class OfflineDriver:
    """Stands where Triton's CUDA driver would, and knows only which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """The capability: Triton keys a kernel's compiled variants by the device, and here these differ by nothing else."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch the package asked for, and the kernel compiled for it; options are num_warps, num_stages and their like."""

    kernel: str
    constexprs: dict[str, Any]
    options: dict[str, Any]
    compiled: CompiledKernel


class _Compiling:
    """A kernel that compiles where it would run: `kernel[grid](*args, **options)` adds to `launches`."""

    def __init__(self, kernel: JITFunction[Any], launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **keywords: Any) -> None:
            compiled = self._kernel.warmup(*args, grid=grid, **keywords)
            names = self._kernel.arg_names
            constexprs = {name: value for name, value in keywords.items() if name in names}
            options = {name: value for name, value in keywords.items() if name not in names}
            self._launches.append(Launch(self._kernel.__name__, constexprs, options, compiled))

        return run


@contextmanager
def offline(capability: int) -> Iterator[list[Launch]]:
    """Compile for `capability` (80, 90, ...) whatever is launched inside; yields the list the launches go to, in order.

    Raises what Triton raises for a kernel it cannot compile, and RuntimeError for a kernel decorated under TRITON_INTERPRET=1.
    """
    launches: list[Launch] = []
    launch = launching.launch

    def compile_launch(plan: launching.Plan, *args: Any) -> None:
        if not isinstance(plan.kernel, JITFunction):
            raise RuntimeError(f"{plan.kernel} cannot be compiled: import the kernels in a process without TRITON_INTERPRET")
        launch(replace(plan, kernel=_Compiling(plan.kernel, launches), compiled={}), *args)

    # Reading `driver.active` would look for a GPU, so what was active is kept by its private name.
    active = driver._active
    launching.launch = compile_launch
    driver.set_active(OfflineDriver(capability))
    try:
        yield launches
    finally:
        launching.launch = launch
        driver.set_active(active)
