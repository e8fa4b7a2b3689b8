"""PEFT's Embedding, accelerated by `fastlora.layers.embedding`: no (ids, dim) tensor beside y, and no activation is saved."""

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from fastlora.boundary import changing
from fastlora.layers.embedding import LoraEmbeddingFunction
from fastlora.peft.fused import Fused
from fastlora.peft.report import SMALL
from fastlora.peft.state import only_adapter, unsupported_call, unsupported_tensors
from fastlora.validation import is_altered
from fastlora.variants.several import Adapter

#: On a CPU, elements of y below which PEFT's step takes as long: ours is 1.03 of theirs at 2**10 (16 ids of dim 64), 0.95 at
#: 2**15 and 0.5 at 2**22 (float32, one thread).
BREAK_EVEN = 1 << 14


class FusedEmbedding(Fused, Embedding):
    """`peft.tuners.lora.layer.Embedding`, fused."""

    base_layer: Any

    def _decide(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Adapter | str:
        given = terms(self)
        if isinstance(given, str):
            return given
        if reason := unsupported_call(self, x, args, kwargs):
            return reason
        if x.dtype not in (torch.int64, torch.int32):
            return f"x is {x.dtype}, not int64 or int32"
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return SMALL if on_cpu and x.numel() * self.base_layer.weight.shape[1] < BREAK_EVEN else given

    def _fused(self, given: Adapter, x: Tensor, *_: Any) -> Tensor:
        """ids (...) -> (..., dim)."""
        base = self.base_layer
        padding_idx = -1 if base.padding_idx is None else base.padding_idx
        B, scaling = changing(given.lora_B, given.scaling)
        return LoraEmbeddingFunction.apply(x, base.weight, given.lora_A, B, scaling, padding_idx, base.scale_grad_by_freq)


def unsupported_reason(layer: Any) -> str | None:
    """Why the layer cannot be accelerated, whatever its adapters are; None if it can."""
    base = layer.base_layer
    if type(base) is not nn.Embedding:
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    if is_altered(base):
        return "its base layer has hooks, or a forward of its own"
    if base.max_norm is not None or base.sparse:
        return "its base layer has max_norm or sparse gradients"
    if getattr(base, "embed_scale", None) is not None:
        return "its base layer has an embed_scale, which PEFT applies to the adapter"
    return "it is split for tensor parallelism" if getattr(layer, "input_fns", None) else None  # new in PEFT 0.19


def terms(layer: Any) -> Adapter | str:
    """The adapter that the layer adds in its present state, or why PEFT computes it."""
    if reason := unsupported_reason(layer):
        return reason
    names = only_adapter(layer, layer.lora_embedding_A)
    if isinstance(names, str):
        return names
    given = Adapter(*(values[names[0]] for values in (layer.lora_embedding_A, layer.lora_embedding_B, layer.scaling)))
    return unsupported_tensors(layer, given) or given
