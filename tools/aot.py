"""Compile the kernels that the package launches, without a GPU.

Every launch of the package goes through `fastlora.kernels.launch.launch`.  Inside `offline(capability)` a launch compiles its
kernel instead of running it.  Triton's `warmup` specialises the kernel on the arguments of the launch, as a real launch would.
Tensors may be on the meta device.  Compiled kernels go to Triton's cache on disk.
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

GFX942 = 942  # stands for an AMD MI300 where an NVIDIA GPU has its capability


class OfflineDriver:
    """Replaces Triton's driver of a GPU.  It knows only which one to compile for: an NVIDIA capability, or GFX942."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64) if self._capability == GFX942 else GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """The capability, so that Triton keeps the kernels of different capabilities apart."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """A launch of the package and the kernel compiled for it.  options: num_warps, num_stages and so on."""

    kernel: str
    constexprs: dict[str, Any]
    options: dict[str, Any]
    compiled: CompiledKernel


class _Compiling:
    """A kernel that compiles instead of running: `kernel[grid](*args, **options)` appends to `launches`."""

    def __init__(self, kernel: JITFunction[Any], launches: list[Compiled]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **keywords: Any) -> None:
            compiled = self._kernel.warmup(*args, grid=grid, **keywords)
            names = self._kernel.arg_names
            constexprs = {name: value for name, value in keywords.items() if name in names}
            options = {name: value for name, value in keywords.items() if name not in names}
            self._launches.append(Compiled(self._kernel.__name__, constexprs, options, compiled))

        return run


@contextmanager
def offline(capability: int) -> Iterator[list[Compiled]]:
    """Compile every launch inside for `capability` (80, 90, ..., GFX942).  Yields the list of the launches, in order.

    Raises:
        RuntimeError: a kernel was imported under TRITON_INTERPRET=1.  Triton's own errors pass through.
    """
    launches: list[Compiled] = []
    launch = launching.launch

    def compile_launch(plan: launching.Plan, *args: Any) -> None:
        if not isinstance(plan.kernel, JITFunction):
            raise RuntimeError(f"{plan.kernel} cannot be compiled: import the kernels in a process without TRITON_INTERPRET")
        launch(replace(plan, kernel=_Compiling(plan.kernel, launches), compiled={}), *args)

    # Reading the public `driver.active` looks for a GPU.
    active = driver._active
    launching.launch = compile_launch
    driver.set_active(OfflineDriver(capability))
    try:
        yield launches
    finally:
        launching.launch = launch
        driver.set_active(active)
