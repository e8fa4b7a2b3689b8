"""The experts of a mixture with LoRA on their weights. PEFT adds scaling · B A to the whole stack of weights; this does not.

transformers keeps the weights of E experts in one tensor, and PEFT's `ParamWrapper` (`target_parameters` of a LoraConfig) adapts
one such stack. Sort the M = tokens · top_k rows of x by expert: segment e holds the rows that are routed to expert e. Then

    S_e = x_e A_eᵀ                             A_e (r, in)
    y_e = x_e W_eᵀ + scaling · S_e B_eᵀ        W_e (out, in), B_e (out, r)

for each segment, and autograd's backward of these products is

    dS_e = scaling · dy_e B_e        dB_e = scaling · dy_eᵀ S_e        dA_e = dS_eᵀ x_e        dx_e = dy_e W_e + dS_e A_e

Saved for backward: x (M, in), S (M, r), the ends of the segments, and views of W. Nothing of W's size is allocated. The products
run in W's dtype, also under autocast, as in transformers' default implementation. A and B are cast to it, as in PEFT.
"""

import inspect
from typing import Any

import torch
from peft.tuners.lora import layer as pefts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.integrations import moe

from fastlora.peft.base import PLAIN_TENSORS
from fastlora.peft.calls import INACTIVE, MERGED, Adapter, adapter
from fastlora.peft.fused import Fused, note
from fastlora.validation import FLOAT_DTYPES, is_altered

#: Implementations of transformers that compute the same function; "eager" is the forward of the class.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
#: What transformers' decorator for experts can say of a class. `run` obeys all of it.
OPTIONS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"}
ALIGNMENT = 16  # bytes: torch's grouped product refuses rows that start elsewhere


class ParamWrapper(Fused, pefts.ParamWrapper):
    """`peft.tuners.lora.layer.ParamWrapper`, without an adapted stack. It has the same name, by which PEFT knows the class.

    Wrappers of several parameters are nested. The outermost one computes the terms of all.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (tokens, in), expert indices and routing weights, both (tokens, top_k) -> (tokens, in), here or by PEFT."""
        given = terms(self)
        if not isinstance(given, str) and (len(args) != 2 or kwargs):
            given = "the experts are called with other arguments than x, indices and routing weights"
        if not isinstance(given, str) and torch.compiler.is_compiling():
            given = "torch.compile is tracing"
        if isinstance(given, str):
            note(self, given)
            return pefts.ParamWrapper.forward(self, x, *args, **kwargs)
        return run(self.get_base_layer(), given, x, *args)


def unsupported_reason(layer: pefts.ParamWrapper) -> str | None:
    """Why the wrapper cannot be accelerated, whatever its adapters are; None if it can."""
    experts, name = layer.get_base_layer(), layer.parameter_name
    if not OPTIONS <= vars(experts).keys() or name not in stacks_of(experts):
        return f"it adapts {type(experts).__name__}.{name}, not a weight stack of transformers' experts"
    known = OPTIONS | {"experts_class", "experts_interface"}
    if unknown := sorted(inspect.signature(moe.use_experts_implementation).parameters.keys() - known):
        return f"its experts may have {', '.join(unknown)}, which fastlora does not know"
    if layer.num_experts < 2 or layer.get_param().dim() != 3:
        return f"its parameter has shape {tuple(layer.get_param().shape)}, and is no stack of experts"
    if getattr(layer, "_did_swap_in_out_features", False) == experts.is_transposed:
        return "its A and B are exchanged: PEFT before 0.19 lays them out so"
    return None


def stacks_of(experts: Any) -> tuple[str, str]:
    """The names of the two stacks of weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def terms(layer: pefts.ParamWrapper) -> dict[str, Adapter] | str:
    """The adapter of each stack in the present state of the wrapper and those below it, or why PEFT computes the call."""
    found: dict[str, Adapter] = {}
    inner: Any = layer
    while isinstance(inner, pefts.ParamWrapper):
        if not isinstance(inner, ParamWrapper):
            return "a layer below it is not accelerated"
        given = adapter(inner)
        if not isinstance(given, str):
            found[inner.parameter_name] = given
        elif inner is layer or given not in (INACTIVE, MERGED):
            return given
        inner = inner.base_layer
        if is_altered(inner):
            return "its base layer has hooks, or a forward of its own"
    return _unsupported_experts(inner, found) or found


def _unsupported_experts(experts: Any, found: dict[str, Adapter]) -> str | None:
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
        if name in found and not weight.device == found[name].lora_A.device == found[name].lora_B.device:
            return f"its base weight is on {weight.device}, the adapter on {found[name].lora_A.device}"
    return None


def run(experts: Any, adapters: dict[str, Adapter], x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
    """What `experts` computes of x (tokens, in), with the LoRA terms of `adapters` (name of the stack -> adapter).

    index, routing (tokens, top_k): the experts of each token, and the weights of their outputs.
    """
    top_k = index.shape[-1]
    expert, order = index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts.num_experts, device=x.device), right=True, out_int32=True)

    def linear(name: str, rows: Tensor) -> Tensor:
        weight = getattr(experts, name)
        y = grouped_lora_linear(rows, weight if experts.is_transposed else weight.mT, adapters.get(name), ends)
        return y.add_(getattr(experts, f"{name}_bias")[expert]) if experts.has_bias else y

    up, down = stacks_of(experts)
    hidden = linear(up, x[order // top_k])
    y = linear(down, experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden))
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * routing.reshape(-1, 1)[order]
    return y[order.argsort()].view(*index.shape, -1).sum(1).to(x.dtype)


def grouped_lora_linear(x: Tensor, weight: Tensor, term: Adapter | None, ends: Tensor) -> Tensor:
    """y_e = x_e W_e + scaling · x_e A_eᵀ B_eᵀ for x (M, in), sorted by expert, and W (E, in, out).

    A and B of `term` are PEFT's: the rows of A (E · r, in) are ordered by expert first, the columns of B (out, r · E) by rank
    first. ends (E,), int32: where the segment of each expert ends.
    """
    x = x.to(weight.dtype)
    y = grouped_mm(x, weight, ends)
    if term is None:
        return y
    experts, (out, columns) = weight.shape[0], term.lora_B.shape
    r = columns // experts
    A = term.lora_A.to(weight.dtype).view(experts, r, -1)
    B = (term.lora_B * term.scaling).to(weight.dtype).view(out, r, experts).permute(2, 1, 0)
    padding = -r % (ALIGNMENT // weight.itemsize)
    A, B = F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, 0, 0, padding)).contiguous()
    return y.add_(grouped_mm(grouped_mm(x, A.mT, ends), B, ends))


def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x_e stack_e for each segment: x (M, in), stack (E, in, out) -> (M, out). Torch's grouped product where it has one."""
    old_gpu = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    aligned = all(size * x.itemsize % ALIGNMENT == 0 for size in stack.shape[1:])
    if aligned and not old_gpu and x.dtype != torch.float64:
        return F.grouped_mm(x, stack, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([rows @ weight for rows, weight in zip(x.split(sizes), stack.unbind(), strict=True)])
