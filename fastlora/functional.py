"""`lora_linear` checks its inputs, follows autocast, chooses the backend, draws the seed and applies the Function.

`dropout_mask` is the mask that it takes for a seed.
"""

import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import ops, validation
from fastlora.autograd import LoraLinearFunction
from fastlora.dropout import draw_seed, keep_mask, threshold
from fastlora.quantized import QuantizedWeight, Scheme

#: Whether Triton's interpreter, which runs kernels on CPU tensors, is on.  The variable is read as Triton reads it: asking
#: Triton would import it, and neither `import fastlora` nor a graph that torch.compile traces needs that.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}

HAS_TRITON = importlib.util.find_spec("triton") is not None

#: "fused" and "addmm" are the two forms of "triton"; "fused/<tile>" also names the tile of its GEMMs.
BACKENDS = ("triton", "fused", "addmm", "torch")

#: AMD GPUs with the matrix instructions that the kernels are compiled for (tests/compile).  None has run them.
AMD_GPUS = ("gfx942", "gfx950")

_NO_TRITON = "Triton is not installed (`pip install triton`; it has wheels for Linux)"


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, with gradients for x, A, B and bias.  W is frozen.

    drop(x) zeroes each element of x with probability dropout_p and scales the others by the inverse of the realised keep rate.
    `fastlora.dropout_mask(seed, M, in, dropout_p)` is the mask.  Products are summed in float32.  A 16-bit result is rounded
    once by "fused"; "addmm" and "torch" round the first term once more when they add the second, as eager torch does.

    Args:
        x: (..., in), any strides.
        weight: (out, in), must not require grad; or a `fastlora.quantized.QuantizedWeight`, which is made dense in x's dtype
            for each product and saved packed.
        lora_A: (r, in).  lora_B: (out, r).
        bias: (out,) or None; may require grad.  With a quantised weight it may have any floating dtype and is cast to x's, as
            bitsandbytes does.
        scaling: alpha / r, or alpha / √r with rsLoRA.
        dropout_p: drop probability in [0, 1], realised in steps of 1/32768.
        training: False turns dropout off, whatever dropout_p and seed are.
        seed: the mask's seed: an int, or an int64 tensor of one element on x.device.  None draws one from torch's default
            generator of x.device.
        backend: None takes "triton" on an NVIDIA GPU of capability 8.0 or newer unless x is float64, otherwise "torch".
            "triton" runs the form that suits the shape (`fastlora.dispatch`).  "fused" and "addmm" insist on one;
            "fused/128,256,64,32,8,3,8" also names the GEMM's tile, which operands that cannot take it ignore.

    Dtypes: x, weight and bias share one of float32, float16, bfloat16, float64.  lora_A and lora_B share that dtype too, or are
    float32 while x is 16-bit.  Under autocast all are cast first, as F.linear would.  float32 products use TF32 on the tensor
    cores where torch's own switch (`torch.backends.cuda.matmul`) allows it.

    Returns:
        (..., out) in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, layout, shape, device or range.
        RuntimeError: a backend that cannot run these tensors, a functorch transform, or a second derivative.
    """
    validation.check_tensor(x, "x")
    autocast_dtype = _autocast_dtype(x.device)
    validation.check_inputs(x, weight, lora_A, lora_B, bias, autocast_dtype)
    validation.check_number(scaling, "scaling")
    validation.check_dropout_p(dropout_p, "dropout_p")
    validation.check_seed(seed, x.device)
    dtype = validation.autocast_target(x, autocast_dtype)
    backend = _choose_backend(backend, x.device, dtype)
    if validation.is_transformed():
        raise RuntimeError(
            "lora_linear does not support functorch transforms (torch.func.grad, vmap, jvp, ...): "
            "its backward is not itself differentiable; use torch.autograd"
        )
    quantization: tuple[Scheme | Tensor, ...] = ()
    if isinstance(weight, QuantizedWeight):
        quantization, weight = (weight.scheme, *weight.statistics), weight.packed
    if autocast_dtype is not None:
        x, lora_A, lora_B = (t.to(validation.autocast_target(t, autocast_dtype)) for t in (x, lora_A, lora_B))
        weight = weight if quantization else weight.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    if lora_A.shape[0] == 0 and not quantization:
        return F.linear(x, weight, bias)
    if not training or threshold(dropout_p) == 0:
        dropout_p, seed = 0.0, None
    elif seed is None:
        seed = draw_seed(x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)  # without a copy from the host
    arguments = x, weight, lora_A, lora_B, bias, seed, float(scaling), float(dropout_p), backend
    if quantization or torch.is_grad_enabled():
        return LoraLinearFunction.apply(*arguments, *quantization)
    return ops.LORA_LINEAR(*arguments)[0]  # a fifth of the host's time less, which is what decoding waits for


def dropout_mask(
    seed: int | Tensor, rows: int, cols: int, p: float, *, projection: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The keep mask of a (rows, cols) activation, True = kept, bit for bit the one that the kernels use.

    Args:
        seed: an int in [-2**63, 2**63), or an int64 tensor of one element.
        rows, cols: the shape of x viewed as (M, in).
        p: drop probability in [0, 1]; the realised rate is round(p * 32768) / 32768.
        projection: which of the masks of this seed, at least 0 and below 2**32; a single linear takes mask 0.
        device: where the mask is made; default: the seed's device for a tensor, torch's default device for an int.

    Returns:
        bool (rows, cols).

    Raises:
        TypeError: seed is neither an int nor an int64 tensor.
        ValueError: p outside [0, 1], a negative size, a projection or a seed that does not fit.
    """
    validation.check_dropout_p(p, "p")
    validation.check_size(rows, "rows")
    validation.check_size(cols, "cols")
    validation.check_size(projection, "projection")
    if projection >= 1 << 32:
        raise ValueError(f"projection must be below 2**32, got {projection}")
    validation.check_seed(seed)
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    return keep_mask(seed.to(device=device).reshape(1), rows, cols, p, projection)


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


def _choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "torch":
        return backend
    available = available_backends(device)
    if backend is None:
        return "torch" if dtype == torch.float64 else available[0]
    if backend == "prefill":
        warnings.warn('backend="prefill" is now called "addmm"; the old name will go', FutureWarning, stacklevel=3)
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


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
