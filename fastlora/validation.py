"""The checks at the public boundary. Each error names the argument, its value and what was expected, before any launch."""

import sys
import warnings
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from fastlora.quantized import QuantizedWeight

Weight: TypeAlias = "Tensor | QuantizedWeight"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
LARGEST = sys.float_info.max  # an int may be beyond it


def _check_type(value: object, name: str, expected: str, *kinds: type) -> None:
    """`value` is one of `kinds`. A bool is an int to Python, but not here."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}")


def check_size(value: int, name: str) -> None:
    """`value` is an int >= 0."""
    _check_type(value, name, "an int", int, torch.SymInt)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_dropout_p(p: float, name: str) -> None:
    """`p` is a number in [0, 1]; NaN is not."""
    _check_type(p, name, "a float in [0, 1]", int, float)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {p}")


def check_number(value: float, name: str) -> None:
    """`value` is a number that a float holds, and finite: an infinite or NaN scaling would first show as NaN in the loss."""
    _check_type(value, name, "a float", int, float)
    if not abs(value) <= LARGEST:  # torch.compile cannot trace math.isfinite on a symbolic float
        raise ValueError(f"{name} must be finite, got {value}")


def check_flag(value: bool, name: str) -> None:
    """`value` is a bool: PEFT's bias="none" would count as true."""
    _check_type(value, name, "a bool", bool)


def check_seed(seed: int | Tensor | None, device: torch.device | None = None) -> None:
    """`seed` is None, an int in [-2**63, 2**63), or an int64 tensor of one element, on `device` if that is given."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got dtype {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        if device is not None and seed.device != device:
            raise ValueError(f"seed is on {seed.device}, expected x's device {device}")
    elif seed is not None:
        _check_type(seed, "seed", "None, an int or an int64 tensor of one element", int)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in 64 signed bits, got {seed}")


def check_rank(r: int, in_features: int, out_features: int, stacklevel: int = 4) -> None:
    """r >= 0. Warns for r > min(in, out): a smaller rank gives the same functions."""
    check_size(r, "r")
    if r > min(in_features, out_features) and not torch.compiler.is_compiling():
        warnings.warn(
            f"r={r} is above min(in_features={in_features}, out_features={out_features}): the product of lora_B and lora_A "
            f"cannot have a higher rank than {min(in_features, out_features)}",
            stacklevel=stacklevel,
        )


def check_dtype(dtype: torch.dtype, name: str, hint: str = "") -> None:
    """`dtype` is one of FLOAT_DTYPES."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype!r}{hint}")


def check_tensor(tensor: Tensor, name: str, dim: int | None = None) -> None:
    """`tensor` is a dense tensor in one of FLOAT_DTYPES, with `dim` dimensions if that is given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}: call .to_dense() first")
    packed = name == "weight" and not tensor.is_complex()
    check_dtype(tensor.dtype, name, hint="; dequantise it first, or pass a QuantizedWeight" if packed else "")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension(s), got shape {tuple(tensor.shape)}")


def check_adapter_dtype(adapter: torch.dtype, dtype: torch.dtype, base: str) -> None:
    """The factors' dtype is `dtype`, that of `base`, or float32 where that is 16-bit."""
    if adapter != dtype and not (adapter == torch.float32 and dtype in HALF_DTYPES):
        raise TypeError(
            f"lora_A and lora_B are {adapter} but {base} is {dtype}: the adapters must have {base}'s dtype, or be "
            f"float32 with {base} in float16 or bfloat16"
        )


def check_frozen(weight: Tensor) -> None:
    """`weight` requires no gradient."""
    if weight.requires_grad and not is_transformed():  # lora_linear refuses transforms with an error of their own
        raise ValueError(
            "weight requires grad, but fastlora computes no gradient for the frozen weight: "
            "call weight.requires_grad_(False), or pass weight.detach()"
        )


def check_inputs(
    x: Tensor | None, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, autocast_dtype: torch.dtype | None
) -> None:
    """Types, layouts, devices and shapes, and the dtypes after autocast. `check_tensor(x)` comes before; a module has no x yet.

    weight and bias must have x's dtype. lora_A and lora_B must have it too, or be float32 if x is 16-bit.
    """
    packed = None if isinstance(weight, Tensor) else getattr(weight, "packed", None)
    frozen = cast(Tensor, weight) if packed is None else packed
    base, like = ("weight", frozen) if x is None else ("x", x)
    dtype, dtypes = autocast_target(like, autocast_dtype), {}
    named = [("weight", frozen, 2), ("lora_A", lora_A, 2), ("lora_B", lora_B, 2)]
    for name, tensor, dim in named if bias is None else [*named, ("bias", bias, 1)]:
        if tensor is not packed:
            check_tensor(tensor, name, dim)
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, but {base} is on {like.device}: all tensors must share a device")
        dtypes[name] = autocast_target(tensor, autocast_dtype)

    (out_features, in_features), r = weight.shape, lora_A.shape[0]
    if x is not None and x.shape[-1:] != (in_features,):
        expected = f"weight {(out_features, in_features)} expects its last dimension to be {in_features}"
        raise ValueError(f"x has shape {tuple(x.shape)}, but {expected}")
    if lora_A.shape[1] != in_features:
        raise ValueError(f"lora_A must be (r, in) with in={in_features}, got {tuple(lora_A.shape)}")
    if lora_B.shape != (out_features, r):
        raise ValueError(f"lora_B must be (out, r) = {(out_features, r)}, got {tuple(lora_B.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be (out,) = ({out_features},), got {tuple(bias.shape)}")

    if packed is None:
        for name in ("weight", "bias"):
            if dtypes.get(name, dtype) != dtype:
                raise TypeError(f"{name} is {dtypes[name]} but {base} is {dtype}: x, weight and bias must share a dtype")
    elif dtype == torch.float64:
        raise TypeError(f"x is {dtype}, but a quantised weight can be made in float32, float16 and bfloat16 only")
    if dtypes["lora_A"] != dtypes["lora_B"]:
        raise TypeError(f"lora_A is {dtypes['lora_A']} but lora_B is {dtypes['lora_B']}: they must share a dtype")
    check_adapter_dtype(dtypes["lora_A"], dtype, base)
    check_frozen(frozen)
    if x is not None:
        check_rank(r, in_features, out_features, stacklevel=5)


def check_call(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    autocast_dtype: torch.dtype | None,
    name: str = "",
) -> None:
    """`check_inputs`, and the ranges of scaling and dropout_p, of one linear. `name` stands before what an error says."""
    try:
        check_inputs(x, weight, lora_A, lora_B, bias, autocast_dtype)  # type: ignore[arg-type]  # None is refused
        check_number(scaling, "scaling")
        check_dropout_p(dropout_p, "dropout_p")
    except (TypeError, ValueError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None


def check_linear(linear: nn.Module, fan_in_fan_out: bool) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of `linear`: an nn.Linear, or with fan_in_fan_out another module with a weight (in, out) and a bias.

    Refuses a linear that computes more than x Wᵀ + bias, because the new module would not.
    """
    kind = type(linear).__name__
    if isinstance(linear, nn.Linear) == fan_in_fan_out or not (hasattr(linear, "weight") and hasattr(linear, "bias")):
        expected = "a module with a bias and a weight (in, out), unlike an nn.Linear's," if fan_in_fan_out else "an nn.Linear"
        raise TypeError(f"linear must be {expected} with fan_in_fan_out={fan_in_fan_out}, got {kind}")
    check_unaltered(linear, "linear")
    return cast(tuple[Tensor, Tensor | None], (linear.weight, linear.bias))


def check_unaltered(module: nn.Module, name: str) -> None:
    """`module` computes what its class does with its weight: another module on that weight can take its place."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module) or any(key in module._parameters for key in ("weight_g", "weight_orig")):
        raise TypeError(f"{name} is a {kind} whose weight is parametrised: remove the parametrisation first")
    if is_altered(module):
        raise ValueError(f"{name} is a {kind} with hooks or a forward of its own, which would not run: remove them first")


def check_model(model: nn.Module) -> None:
    """`model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def is_altered(module: nn.Module) -> bool:
    """Whether a call of `module` runs anything but the forward of its class: hooks, or a forward set on the instance.

    accelerate's device_map sets a forward that only moves x to the weights' device. It does not count, unless it offloads.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or ("forward" in module.__dict__ and not _only_moves_x(module))


def _only_moves_x(module: nn.Module) -> bool:
    """Whether the forward on the instance is accelerate's, around the forward of the class, without offloading."""
    hook, inner = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    return (
        (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")
        and not (hook.offload or hook.no_grad)  # type: ignore[union-attr]  # checked by name: accelerate is optional
        and getattr(module.forward, "__wrapped__", None) == inner
        and getattr(inner, "__func__", None) is type(module).forward
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is active. torch.func.grad makes all its arguments require grad, frozen ones too."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives a linear on `device`, None where autocast is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_target(tensor: Tensor, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that F.linear would see: autocast casts every floating tensor except float64."""
    return tensor.dtype if autocast_dtype is None or tensor.dtype == torch.float64 else autocast_dtype
