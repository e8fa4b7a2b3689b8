"""Layers of libraries other than bitsandbytes on a packed weight, and the dense weight that each stands for.

torchao and hqq build theirs; a test that needs a missing one is skipped.  GPTQModel needs a build for a GPU, so its layouts are
packed here as checkpoints have them, into classes that stand in for its own.  transformers' FP8Linear is the real one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8

Pair = tuple[nn.Module, Tensor]  # a layer, and its dense weight (out, in) in float32 or wider


def torchao(weight: Tensor, config: str, **options: Any) -> Pair:
    quantization = pytest.importorskip("torchao.quantization")

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if group := options.pop("group", None):
        options["granularity"] = quantization.PerGroup(group)
    quantization.quantize_(linear, getattr(quantization, config)(**options))
    return linear, linear.weight.dequantize().float()


def hqq(weight: Tensor, bits: int, axis: int, **options: Any) -> Pair:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis, **options)
    layer = quantize.HQQLinear.from_weights(weight.float(), None, config, compute_dtype=weight.dtype, device="cpu")
    return layer, layer.dequantize().float()


class BaseQuantLinear(nn.Module):
    """GPTQModel's linear in what PEFT and fastlora see of it."""

    SUPPORTS_METHODS: tuple[Any, ...] = ()
    adapter = None
    online_full_had = online_partial_had = False

    def __init__(self, dense: Tensor, bits: int, group_size: int, desc_act: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.shape
        self.bits, self.group_size, self.desc_act, self.bias = bits, group_size, desc_act, None
        self.register_buffer("dense", dense, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense.to(x.dtype)


class Awq:
    value = "awq"


class TorchLinear(BaseQuantLinear):
    forward = BaseQuantLinear.forward


class AwqTorchLinear(BaseQuantLinear):
    SUPPORTS_METHODS = (Awq,)
    forward = BaseQuantLinear.forward


def pack(codes: Tensor, bits: int, dim: int, order: list[int]) -> Tensor:
    """An int32 for every len(order) neighbours along `dim`; the one at order[i] lies i · bits up."""
    words = sum(
        codes.long().unflatten(dim, (-1, len(order))).select(dim + 1, at) << (bits * place) for place, at in enumerate(order)
    )
    return words.to(torch.int32)  # the highest bit becomes the sign


def gptqmodel(weight: Tensor, layout: str, bits: int = 4, group: int = 16, act_order: bool = False) -> Pair:
    """Asymmetric min-max codes of `weight`, packed; the truth is their definition."""
    W = weight.float().t()  # (in, out), as checkpoints have it
    groups = W.unflatten(0, (-1, group if group > 0 else len(W)))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    index = torch.arange(len(W)) // groups.shape[1]
    if act_order:
        index = index[torch.randperm(len(W), generator=torch.Generator().manual_seed(0))]
    codes = (W / scales[index] + zeros[index]).round().clamp(0, 2**bits - 1)
    dense = (codes - zeros[index]) * scales[index].float()
    layer = (TorchLinear if layout == "gptq" else AwqTorchLinear)(dense.to(weight.dtype), bits, group, act_order)
    order = list(range(32 // bits)) if layout == "gptq" else [0, 2, 4, 6, 1, 3, 5, 7]
    layer.register_buffer("qweight", pack(codes, bits, 0 if layout == "gptq" else 1, order))
    layer.register_buffer("qzeros", pack(zeros, bits, 1, order))
    layer.register_buffer("scales", scales)
    layer.register_buffer("g_idx", index.int())
    return layer, dense.t()


def fp8(weight: Tensor, block: tuple[int, int] | None) -> Pair:
    N, K = weight.shape
    layer = finegrained_fp8.FP8Linear(K, N, block_size=block)
    rows, columns = block or (N, K)
    blocks = (
        nn.functional.pad(weight.float(), (0, -K % columns, 0, -N % rows)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    )
    scale = blocks.abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:N, :K]
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale if block else scale.reshape(()), requires_grad=False)
    return layer, codes.float() * each


#: name -> (what builds a layer and its truth, its options)
FORMATS: dict[str, tuple[Callable[..., Pair], dict[str, Any]]] = {
    "torchao int8": (torchao, {"config": "Int8WeightOnlyConfig"}),
    "torchao int8 groups": (torchao, {"config": "Int8WeightOnlyConfig", "group": 16}),
    "torchao float8": (torchao, {"config": "Float8WeightOnlyConfig"}),
    "torchao int4": (torchao, {"config": "IntxWeightOnlyConfig", "weight_dtype": torch.int4, "group": 16}),
    **{f"hqq {bits} axis {axis}": (hqq, {"bits": bits, "axis": axis}) for bits in (8, 4, 3, 2, 1) for axis in (0, 1)},
    "hqq 4 as floats": (hqq, {"bits": 4, "axis": 1, "view_as_float": True}),
    **{f"gptq {bits}": (gptqmodel, {"layout": "gptq", "bits": bits}) for bits in (8, 4, 2)},
    "gptq one group": (gptqmodel, {"layout": "gptq", "group": -1}),
    "gptq act order": (gptqmodel, {"layout": "gptq", "act_order": True}),
    "awq": (gptqmodel, {"layout": "awq"}),
    "fp8 blocks": (fp8, {"block": (16, 16)}),
    "fp8 cut blocks": (fp8, {"block": (32, 40)}),
    "fp8 tensor": (fp8, {"block": None}),
}


def packed(name: str, weight: Tensor) -> Pair:
    """A layer of the format on `weight` (out, in), and its dense weight."""
    build, options = FORMATS[name]
    return build(weight, **options)


@contextmanager
def stand_ins() -> Iterator[None]:
    """PEFT and fastlora find the stand-ins for GPTQModel, and FP8Linear's forward, which needs a GPU, a plain one on a CPU."""

    def linear(x: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Tensor | None, *ignored: Any) -> Tensor:
        return nn.functional.linear(x, finegrained_fp8._dequantize_fp8_weight(weight, scale, block, x.dtype), bias)

    package = "gptqmodel.nn_modules.qlinear"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gptqmodel", "gptqmodel.nn_modules", package, f"{package}.torch", f"{package}.torch_awq"):
            patch.setitem(sys.modules, name, ModuleType(name))
        for name, kind in (("", BaseQuantLinear), (".torch", TorchLinear), (".torch_awq", AwqTorchLinear)):
            setattr(sys.modules[package + name], kind.__name__, kind)
        for name in ("peft.tuners.lora.gptq", "peft.tuners.lora.awq", "peft.utils.other"):
            patch.setattr(f"{name}.is_gptqmodel_available", lambda: True)
        patch.setattr(finegrained_fp8, "fp8_linear", linear)
        yield
