"""Triton's launch path without a GPU: its compiler, its launcher and its descriptors are real, libcuda is a stub.

The system's C compiler builds the stub, `stub_driver.c`.  Inside `stub_gpu(capability)` a launch takes tensors of a CPU, goes
through Triton's C launcher and ends in the stub, which counts it and runs nothing.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from tools.aot import OfflineDriver


class Unavailable(RuntimeError):
    """The stub cannot be used in this process; the message says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The stub, built and loaded once.  Triton's modules find its functions under the name of libcuda.so.1.

    Raises:
        Unavailable: there is no C compiler, or the process has loaded a real libcuda.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for it
    if compiler is None:
        raise Unavailable("no C compiler: install gcc or clang, or name one in CC")
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1", os.RTLD_NOLOAD)
        raise Unavailable("this process has loaded a real libcuda.so.1")
    folder = tempfile.mkdtemp(prefix="fastlora-stub-")
    built = Path(folder, "libcuda.so.1")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", built, source], check=True)
    knobs.nvidia.libcuda_path = folder  # where Triton's modules are linked against it
    loaded = ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)
    loaded.stub_launches.restype = ctypes.c_uint64
    return loaded


class StubDriver(OfflineDriver):
    """Triton's CUDA driver over the stub."""

    def __init__(self, capability: int) -> None:
        from triton.backends.nvidia import driver as nvidia

        super().__init__(capability)
        library()
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = nvidia.CudaUtils()


@contextmanager
def stub_gpu(capability: int) -> Iterator[Any]:
    """Launches inside end in the stub, compiled for `capability` (80, 90, ...).  Yields the stub.

    Raises:
        Unavailable: see `library`.
    """
    active, current_device = driver._active, torch.cuda.current_device  # reading `driver.active` would look for a GPU
    driver.set_active(StubDriver(capability))
    torch.cuda.current_device = lambda: capability
    try:
        yield library()
    finally:
        torch.cuda.current_device = current_device
        driver.set_active(active)
