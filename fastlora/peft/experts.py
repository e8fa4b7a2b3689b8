"""The experts of a mixture with LoRA on their weights. PEFT adds scaling · B A to the whole stack of weights; this does not.

transformers keeps the weights of E experts in one tensor. PEFT's `ParamWrapper` (`target_parameters` of a LoraConfig) adapts
one such stack. Sort the M = tokens · top_k rows of x by expert: segment e holds the rows that are routed to expert e. Then

    S_e = x_e A_eᵀ                             A_e (r, in)
    y_e = x_e W_eᵀ + scaling · S_e B_eᵀ        W_e (out, in), B_e (out, r)

for each segment, and autograd's backward of these products is

    dS_e = scaling · dy_e B_e        dB_e = scaling · dy_eᵀ S_e        dA_e = dS_eᵀ x_e        dx_e = dy_e W_e + dS_e A_e

Saved for backward: x (M, in), S (M, r), A, B, the ends of the segments, and W itself. Nothing of W's size is allocated. The
products run in W's dtype, also under autocast, as in transformers' default implementation. A and B are cast to it, as in PEFT.
"""

import inspect
from typing import Any, cast

import torch
from peft.tuners.lora import layer as pefts
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastlora.peft.adapters import INACTIVE, MERGED, adapter
from fastlora.peft.base import PLAIN_TENSORS
from fastlora.peft.fused import Fused
from fastlora.validation import FLOAT_DTYPES, is_altered
from fastlora.variants.several import Adapter

#: Implementations of transformers that compute the same function; "eager" is the forward of the class.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
#: What transformers' decorator for experts can say of a class. `run` obeys all of it.
OPTIONS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"}
ALIGNMENT = 16  # bytes: torch's grouped product refuses rows that start elsewhere

Factors = dict[str, tuple[Tensor, Tensor]]  # name of a stack -> A (E, in, r), scaling · B (E, r, out)


class ParamWrapper(Fused, pefts.ParamWrapper):
    """`peft.tuners.lora.layer.ParamWrapper`, without an adapted stack. It has the same name, by which PEFT knows the class.

    Wrappers of several parameters are nested. The outermost one computes the terms of all.
    """

    def _decide(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors | str:
        if len(args) != 2 or kwargs:
            return "the experts are called with other arguments than x, indices and routing weights"
        given = terms(self)
        if not isinstance(given, str) and x.device != self.get_param().device:
            return f"x is on {x.device}, the base weight on {self.get_param().device}"
        return given

    def _fused(self, given: Factors, x: Tensor, *args: Any) -> Tensor:
        """x (tokens, in), expert indices and routing weights, both (tokens, top_k) -> (tokens, in)."""
        return run(self.get_base_layer(), given, x, *args)


def unsupported_reason(layer: pefts.ParamWrapper) -> str | None:
    """Why the wrapper cannot be accelerated, whatever its adapters are; None if it can."""
    experts, name = layer.get_base_layer(), layer.parameter_name
    exchangeable = vars(experts).keys() >= OPTIONS | {"_is_expert_parallel"}
    if not exchangeable or name not in stacks_of(experts) or layer.num_experts == 1:
        return f"it adapts {type(experts).__name__}.{name}, not a weight stack of transformers' experts"
    from transformers.integrations import moe  # transformers 4 has none, and no such experts

    known = OPTIONS | {"experts_class", "experts_interface"}
    if unknown := sorted(inspect.signature(moe.use_experts_implementation).parameters.keys() - known):
        return f"its experts may have {', '.join(unknown)}, which fastlora does not know"
    return None


def stacks_of(experts: Any) -> tuple[str, str]:
    """The names of the two stacks of weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def terms(layer: pefts.ParamWrapper) -> Factors | str:
    """The LoRA term of each stack in the present state of the wrapper and those below it, or why PEFT computes the call."""
    experts, inner = layer.get_base_layer(), cast(Any, layer)
    adapters: dict[Any, Adapter] = {}
    while inner is not experts:
        if not isinstance(inner, ParamWrapper):
            return "a layer below it is not accelerated"
        given = adapter(inner)
        if not isinstance(given, str):
            adapters[inner] = given
        elif inner is layer or given not in (INACTIVE, MERGED):
            return given
        inner = inner.base_layer
        if is_altered(inner):
            return "its base layer has hooks, or a forward of its own"
    if reason := _unsupported_experts(experts):
        return reason
    for wrapper, (A, B, *_) in adapters.items():
        if not wrapper.get_param().device == A.device == B.device:
            return f"its base weight is on {wrapper.get_param().device}, the adapter on {A.device} and {B.device}"
    return {wrapper.parameter_name: _factors(wrapper, given) for wrapper, given in adapters.items()}


def _factors(layer: pefts.ParamWrapper, given: Adapter) -> tuple[Tensor, Tensor]:
    """A (E, in, r) and scaling · B (E, r, out) in W's dtype.

    The rows of lora_A (E · r, in) are ordered by expert first, the columns of lora_B (out, r · E) by rank first. PEFT before
    0.19 exchanges their roles for weights stored (out, in).
    """
    A = given.lora_A.reshape(layer.num_experts, -1, given.lora_A.shape[1])
    B = (given.lora_B * given.scaling).reshape(given.lora_B.shape[0], -1, layer.num_experts).permute(2, 1, 0)
    if not layer.get_base_layer().is_transposed and not getattr(layer, "_did_swap_in_out_features", False):
        A, B = B, A
    dtype = layer.get_param().dtype
    return A.to(dtype).contiguous().mT, B.to(dtype).contiguous()


def _unsupported_experts(experts: Any) -> str | None:
    if experts.config._experts_implementation not in IMPLEMENTATIONS:
        return f"its experts run through {experts.config._experts_implementation!r}"
    if experts._is_expert_parallel:
        return "its experts are spread over devices"
    if parametrize.is_parametrized(experts):
        return "its base weight is parametrised"
    for name in stacks_of(experts):
        weight = getattr(experts, name)
        if type(weight) not in PLAIN_TENSORS or weight.dtype not in FLOAT_DTYPES:
            return f"its base weight is a {type(weight).__name__} of {weight.dtype}"
        if weight.requires_grad:
            return "its base weight is trainable"
        if torch.compiler.is_compiling() and not takes_grouped_mm(weight_of(experts, name)):
            return "torch.compile traces grouped products in bfloat16 alone, with rows of a multiple of 16 bytes"
    return None


def weight_of(experts: Any, name: str) -> Tensor:
    """W (E, in, out)."""
    weight: Tensor = getattr(experts, name)
    return weight if experts.is_transposed else weight.mT


def run(experts: Any, factors: Factors, x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
    """What `experts` computes of x (tokens, in), with the LoRA terms of `factors`.

    index, routing (tokens, top_k): the experts of each token, and the weights of their outputs.
    """
    top_k = index.shape[-1]
    expert, order = index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts.num_experts, device=x.device), right=True, out_int32=True)

    def linear(name: str, rows: Tensor) -> Tensor:
        weight = weight_of(experts, name)
        y = grouped_lora_linear(rows.to(weight.dtype), weight, factors.get(name), ends)
        return y.add_(getattr(experts, f"{name}_bias")[expert]) if experts.has_bias else y

    up, down = stacks_of(experts)
    hidden = linear(up, x[order // top_k])
    y = linear(down, experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden))
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * routing.reshape(-1, 1)[order]
    return y[order.argsort()].view(*index.shape, y.shape[-1]).sum(1).to(x.dtype)


def grouped_lora_linear(x: Tensor, weight: Tensor, factors: tuple[Tensor, Tensor] | None, ends: Tensor) -> Tensor:
    """y_e = x_e W_e + x_e A_e B_e for x (M, in), sorted by expert, and W (E, in, out).

    factors: A (E, in, r) and B (E, r, out), or None for no such term. ends (E,), int32: where each segment ends.
    """
    y = grouped_mm(x, weight, ends)
    if factors is None:
        return y
    A, B = factors
    padding = -A.shape[-1] % (ALIGNMENT // x.itemsize)
    A, B = F.pad(A, (0, padding)), F.pad(B, (0, 0, 0, padding))
    return y.add_(grouped_mm(grouped_mm(x, A, ends), B, ends))


def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x_e stack_e for each segment: x (M, in), stack (E, in, out) -> (M, out)."""
    if takes_grouped_mm(stack):
        return F.grouped_mm(x, stack, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), stack.unbind(), strict=True)])


def takes_grouped_mm(stack: Tensor) -> bool:
    """Whether torch's grouped product takes stack (E, in, out), at present: torch.compile traces it in bfloat16 alone."""
    device = stack.device
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        return False
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    return stack.dtype in dtypes and all(size * stack.itemsize % ALIGNMENT == 0 for size in stack.shape[1:])
