"""The decision at one call: the arguments of `lora_linear`, or the reason why the call runs PEFT's forward.

A call is fused if exactly one active adapter has weights in the layer, and

    the layer     is neither merged nor disabled, and casts its input as PEFT does by default
    the adapter   is plain or DoRA, no other variant (aLoRA, ...); A and B are linears without bias, its dropout is nn.Dropout
                  or nn.Identity
    the base      is an nn.Linear or Conv1D that does nothing else, with a frozen weight; or a quantised layer that
                  `fastlora.quantized` reads, with dtypes that its `unsupported_input` accepts
    the call      passes x alone, a dense tensor; is not decoding on a GPU (few rows, no gradient), where PEFT's launches cost
                  less; is not small on a CPU (`torch_backend.BREAK_EVEN`); is not traced by torch.jit, and not
                  differentiated by torch.func or in forward mode
    the dtypes    x, W and bias share one; A and B share that one, or are float32 and it is 16-bit. Autocast applies first.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fastlora import quantized, torch_backend
from fastlora.functional import _autocast_dtype
from fastlora.peft.base import PLAIN_TENSORS, weight_of
from fastlora.peft.report import SMALL
from fastlora.validation import FLOAT_DTYPES, HALF_DTYPES, autocast_target, is_altered, is_transformed

DISABLED = "adapters are disabled"
MERGED = "adapters are merged"
INACTIVE = "no active adapter has weights here"
MIXED_BATCH = "adapter_names mixes adapters in one batch"
UNCAST = "casting of the input is disabled"

DECODING = "few rows without a gradient, as in decoding"

#: Fallbacks that never warn: requested by the user, or free.
INTENDED = frozenset({DISABLED, MERGED, INACTIVE, MIXED_BATCH, UNCAST, DECODING, SMALL})


class Adapter(NamedTuple):
    """The one active adapter of a layer: A (r, in), B (out, r), and the magnitude (out,) if it is DoRA."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    magnitude: Tensor | None


class Operands(NamedTuple):
    """The arguments of `lora_linear` after x: weight (out, in), A (r, in), B (out, r), bias (out,) or None.

    With a magnitude (out,) they are those of `fastlora.dora.dora_linear`.
    """

    weight: Tensor | quantized.QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    magnitude: Tensor | None = None


def adapter(layer: Any) -> Adapter | str:
    """The adapter that the layer adds in its present state, or why fastlora does not compute it."""
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        return MERGED
    all_A = layer.lora_A  # looked up once: it takes as long as the rest of this function
    active = [name for name in layer.active_adapters if name in all_A]
    if not active:
        return INACTIVE
    if len(active) > 1:
        return "several adapters are active"
    name = active[0]
    magnitude = None
    if name in layer.lora_variant:
        magnitude = _magnitude(layer, name)
        if isinstance(magnitude, str):
            return magnitude
    if not layer.cast_input_dtype_enabled:
        return UNCAST
    A, B, dropout = all_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"lora_A and lora_B are {type(A).__name__} and {type(B).__name__} instead of plain linears"
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if is_altered(A) or is_altered(B) or is_altered(dropout):
        return "the adapter's modules have hooks, or a forward of their own"
    if A.bias is not None or B.bias is not None:
        return "the adapter has a bias (lora_bias)"
    lora_A, lora_B = A.weight, B.weight
    if type(lora_A) not in PLAIN_TENSORS or type(lora_B) not in PLAIN_TENSORS:
        return f"the adapter's weights are a {type(lora_A).__name__} and a {type(lora_B).__name__}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        # prepare_model_for_compiled_hotswap makes it, to refill it in place. Reading it on the device avoids a synchronisation.
        lora_B, scaling = (lora_B * scaling).to(lora_B.dtype), 1.0
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if magnitude is not None and not layer.training:
        p = 0.0  # DoRA's forward asks the layer too
    return Adapter(lora_A, lora_B, float(scaling), p, magnitude)  # PEFT accepts NumPy's numbers too


def _magnitude(layer: Any, name: str) -> Tensor | str:
    """The magnitude of the DoRA adapter `name`, or why fastlora does not compute the variant."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"the adapter is a variant ({type(layer.lora_variant[name]).__name__})"
    if name not in layer.lora_magnitude_vector:
        held = list(layer.lora_magnitude_vector)
        raise ValueError(f"the DoRA adapter {name!r} has no magnitude: lora_magnitude_vector holds {held}")
    module = layer.lora_magnitude_vector[name]
    if type(module) is not DoraLinearLayer or is_altered(module):
        return "the adapter's modules have hooks, or a forward of their own"
    weight = module.weight
    return weight if type(weight) in PLAIN_TENSORS else f"the adapter's magnitude is a {type(weight).__name__}"


def operands(layer: Any) -> Operands | str:
    """The arguments that the layer passes to `lora_linear` in its present state, or why there are none."""
    given = adapter(layer)
    if isinstance(given, str):
        return given
    base_layer = layer.base_layer
    weight = weight_of(base_layer)
    if isinstance(weight, str):
        return weight
    if isinstance(weight, Tensor) and weight.requires_grad and not is_transformed():
        return "its base weight is trainable"
    lora_A, lora_B, scaling, p, magnitude = given
    if not weight.device == lora_A.device == lora_B.device:
        return f"its base weight is on {weight.device}, the adapter on {lora_A.device} and {lora_B.device}"
    if magnitude is not None and magnitude.device != weight.device:
        return f"its base weight is on {weight.device}, the magnitude on {magnitude.device}"
    return Operands(weight, lora_A, lora_B, base_layer.bias, scaling, p, magnitude)


def unsupported_input(x: Tensor, given: Operands, layer: Any) -> str | None:
    """Why `lora_linear` cannot compute with this x, or None."""
    if type(x) not in PLAIN_TENSORS or x.layout != torch.strided or x.is_nested:
        return f"x is a {type(x).__name__} that is not dense"
    if x.device != given.weight.device:
        return f"x is on {x.device}, the base weight on {given.weight.device}"
    if is_transformed():
        return "a functorch transform (torch.func) is active"
    if not torch.compiler.is_compiling():
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
        if torch.jit.is_tracing():
            return "torch.jit is tracing"
    weight, autocast = given.weight, _autocast_dtype(x.device)
    base, adapter, other = (autocast_target(t, autocast) for t in (x, given.lora_A, given.lora_B))
    fits = adapter == other and (adapter == base or (adapter == torch.float32 and base in HALF_DTYPES))
    if isinstance(weight, Tensor):
        frozen = (weight,) if given.bias is None else (weight, given.bias)
        fits = fits and base in FLOAT_DTYPES and all(base == autocast_target(t, autocast) for t in frozen)
    elif reason := quantized.unsupported_input(layer.base_layer, x):
        return f"its base layer {reason}"
    if fits:
        return None
    stored = weight.dtype if isinstance(weight, Tensor) else weight.scheme.kind
    return f"x is {x.dtype}, the base weight {stored}, the adapter {given.lora_A.dtype} (autocast: {autocast})"


def _too_small(x: Tensor) -> str | None:
    """The reason why the host's time decides that of the call, which is less with PEFT's forward, or None.

    Decoding on a GPU: PEFT makes as many launches, in less time on the host (`make host-time`).
    """
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        return None
    if x.device.type == "cpu":
        return SMALL if x.numel() < torch_backend.BREAK_EVEN else None
    return DECODING if not torch.is_grad_enabled() and x.numel() <= torch_backend.DECODE_ROWS * x.shape[-1] else None


def decide(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | str:
    """The operands of a fused call, or the reason why layer(x, *args, **kwargs) runs PEFT's forward.

    Raises:
        RuntimeError: torch.fx traces the call.
    """
    if isinstance(x, torch.fx.Proxy):
        raise RuntimeError(
            "torch.fx cannot trace a LoRA layer, neither an accelerated one nor PEFT's after fastlora.decelerate(model): "
            "trace model.merge_and_unload(), or use torch.export"
        )
    if kwargs.get("adapter_names") is not None:
        return MIXED_BATCH
    if reason := _too_small(x):
        return reason
    given = operands(layer)
    if isinstance(given, str):
        return given
    if args or any(value is not None for value in kwargs.values()):
        return "the layer is called with more than x"
    return unsupported_input(x, given, layer) or given
