"""The decision at one call: the arguments of `lora_linear`, or the reason why the call runs PEFT's forward.

A call is fused if an active adapter has weights in the layer, or one that `adapter_names` gives to a row of x, and

    the layer     is neither merged nor disabled, and casts its input as PEFT does by default
    the adapter   is plain, or the only one and DoRA, but no other variant (aLoRA, ...); A and B are linears without bias, its
                  dropout is nn.Dropout or nn.Identity
    the base      is an nn.Linear or Conv1D that does nothing else, with a frozen weight; or a quantised layer that
                  `fastlora.quantized` reads, with dtypes that its `unsupported_input` accepts
    the call      passes x, a dense tensor, and at most adapter_names; is not decoding on a GPU (few rows, no gradient), where
                  PEFT's launches cost less; is not small on a CPU (`torch_backend.BREAK_EVEN`); is not traced by torch.jit,
                  and not differentiated by torch.func or in forward mode
    the dtypes    x, W and bias share one; A and B share that one, or are float32 and it is 16-bit. Autocast applies first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import quantized, torch_backend
from fastlora.peft.adapters import DISABLED, INACTIVE, MERGED, UNCAST, active, adapters
from fastlora.peft.base import PLAIN_TENSORS, weight_of
from fastlora.peft.report import COPIED, SMALL
from fastlora.validation import FLOAT_DTYPES, HALF_DTYPES, autocast_dtype, autocast_target, is_transformed
from fastlora.variants.several import Adapter

DECODING = "few rows without a gradient, as in decoding"

#: Fallbacks that never warn: requested by the user, or free.
INTENDED = frozenset({DISABLED, MERGED, INACTIVE, UNCAST, DECODING, SMALL, COPIED})


class Operands(NamedTuple):
    """The arguments of `lora_linear` after x: weight (out, in), A (r, in), B (out, r), bias (out,) or None.

    With a magnitude (out,) they are those of `fastlora.variants.dora.dora_linear`. With others, the adapters behind the first,
    or an owner (M,) of each row, they are those of `fastlora.variants.several.lora_adapters`.
    """

    weight: Tensor | quantized.QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    magnitude: Tensor | None = None
    others: tuple[Adapter, ...] = ()
    owner: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `lora_linear` takes them."""
        return self.magnitude is None and self.owner is None and len(self.others) == 0


def operands(layer: Any, names: Sequence[str] | None = None) -> Operands | str:
    """The arguments that the layer passes to `lora_linear` in its present state, or why there are none.

    names: the adapters; default: the active ones.
    """
    if names is None and isinstance(names := active(layer), str):
        return names
    given = adapters(layer, names)
    if isinstance(given, str):
        return given
    base_layer = layer.base_layer
    weight = weight_of(base_layer)
    if isinstance(weight, str):
        return weight
    if isinstance(weight, Tensor) and weight.requires_grad and not is_transformed():
        return "its base weight is trainable"
    for lora_A, lora_B, _, _, magnitude in given:
        if not weight.device == lora_A.device == lora_B.device:
            return f"its base weight is on {weight.device}, the adapter on {lora_A.device} and {lora_B.device}"
        if magnitude is not None and magnitude.device != weight.device:
            return f"its base weight is on {weight.device}, the magnitude on {magnitude.device}"
    (lora_A, lora_B, scaling, p, magnitude), *others = given
    return Operands(weight, lora_A, lora_B, base_layer.bias, scaling, p, magnitude, tuple(others))


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
    weight, autocast = given.weight, autocast_dtype(x.device)
    base, fits = autocast_target(x, autocast), True
    pairs = [(given.lora_A, given.lora_B), *(other[:2] for other in given.others)]
    for A, B in pairs:
        adapter, other = autocast_target(A, autocast), autocast_target(B, autocast)
        fits = fits and adapter == other and (adapter == base or (adapter == torch.float32 and base in HALF_DTYPES))
    if isinstance(weight, Tensor):
        frozen = (weight,) if given.bias is None else (weight, given.bias)
        fits = fits and base in FLOAT_DTYPES and all(base == autocast_target(t, autocast) for t in frozen)
    elif reason := quantized.unsupported_input(layer.base_layer, x):
        return f"its base layer {reason}"
    if fits:
        return None
    stored = weight.dtype if isinstance(weight, Tensor) else weight.scheme.kind
    dtypes = ", ".join(sorted({str(A.dtype) for A, _ in pairs}))
    return f"x is {x.dtype}, the base weight {stored}, the adapter {dtypes} (autocast: {autocast})"


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
    mixed = kwargs.get("adapter_names")
    if mixed is not None:
        layer._check_forward_args(x, adapter_names=mixed)  # raises where PEFT's forward would
    if reason := _too_small(x):
        return reason
    names = None
    if mixed is not None and not layer.disable_adapters:
        names = [name for name in dict.fromkeys(mixed) if name in layer.lora_A]
    given = operands(layer, names)
    if isinstance(given, str):
        return given
    if args or any(value is not None for name, value in kwargs.items() if name != "adapter_names"):
        return "the layer is called with more than x"
    if reason := unsupported_input(x, given, layer):
        return reason
    return given if mixed is None or names is None else given._replace(owner=_owner(x, mixed, names))


def _owner(x: Tensor, mixed: Sequence[str], names: Sequence[str]) -> Tensor:
    """The index in `names` of the adapter of each row of x viewed as (M, in), where entry i of x has the adapter mixed[i].

    -1 where the layer has no such adapter, as for PEFT's "__base__".
    """
    index = {name: i for i, name in enumerate(names)}
    entries = torch.tensor([index.get(name, -1) for name in mixed])
    return entries.repeat_interleave(math.prod(x.shape[1:-1])).to(x.device, non_blocking=True)
