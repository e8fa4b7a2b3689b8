"""Which backends can run tensors on a device, and the one that a call takes."""

import importlib.util
import os
import warnings

import torch

#: Whether Triton's interpreter, which runs kernels on CPU tensors, is on.  The variable is read as Triton reads it: asking
#: Triton would import it, and neither `import fastlora` nor a graph that torch.compile traces needs that.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}

HAS_TRITON = importlib.util.find_spec("triton") is not None

#: "fused" and "addmm" are the two forms of "triton"; "fused/<tile>" also names the tile of its GEMMs.
BACKENDS = ("triton", "fused", "addmm", "torch")

#: AMD GPUs with the matrix instructions that the kernels are compiled for (tests/compile).  None has run them.
AMD_GPUS = ("gfx942", "gfx950")

_NO_TRITON = "Triton is not installed (`pip install triton`; it has wheels for Linux)"


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The backends that can run tensors on `device`.  The default one comes first.

    Warns where Triton alone is missing: the "torch" backend takes its place.
    """
    device = torch.device(device)
    on_nvidia = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    on_request = _is_amd_gpu(device) or (device.type == "cpu" and INTERPRETING)
    if not on_nvidia and not on_request:
        return ("torch",)
    if not HAS_TRITON:
        warnings.warn(f"{_NO_TRITON}, so fastlora computes with plain torch operations", RuntimeWarning, stacklevel=2)
        return ("torch",)
    return BACKENDS if on_nvidia else BACKENDS[::-1]


def _is_amd_gpu(device: torch.device) -> bool:
    """Whether `device` is one of AMD_GPUS.  ROCm's name has features behind it: "gfx942:sramecc+:xnack-"."""
    if device.type != "cuda" or torch.version.hip is None:
        return False
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] in AMD_GPUS


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs a call: `backend` itself if it can run here, or the default for None.

    Raises ValueError for an unknown name, TypeError for float64 on kernels, RuntimeError where the kernels cannot run.
    """
    if backend == "torch":
        return backend
    available = available_backends(device)
    if backend is None:
        return "torch" if dtype == torch.float64 else available[0]
    if backend == "prefill":
        warnings.warn('backend="prefill" is now called "addmm"; the old name will go', FutureWarning, stacklevel=4)
        backend = "addmm"
    if not isinstance(backend, str) or (backend not in BACKENDS and not backend.startswith("fused/")):
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if dtype == torch.float64:
        raise TypeError(f'backend="{backend}" computes in float32, float16 or bfloat16, got x in float64: use backend="torch"')
    if "triton" not in available:
        needs = (
            f"it needs an NVIDIA GPU of capability 8.0 or newer, an AMD {AMD_GPUS[0]} or {AMD_GPUS[1]}, or TRITON_INTERPRET=1 "
            "in the environment for Triton's interpreter on a CPU"
        )
        raise RuntimeError(f'backend="{backend}" cannot run tensors on {device}: {needs if HAS_TRITON else _NO_TRITON}')
    return backend
