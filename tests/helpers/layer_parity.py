"""A LoRA layer of ours beside PEFT's of the same values: forward and gradients, judged by the oracle."""

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn

from fastlora import oracle
from fastlora.layers.base import FusedLoraLayer


def of_peft(base: nn.Module, dtypes: tuple[torch.dtype, torch.dtype] = oracle.DTYPES[0], **options: Any) -> Any:
    """PEFT's layer around a copy of `base` with random factors; dtypes are those of the base and of the factors."""
    dtype, adapter_dtype = dtypes
    model = nn.ModuleList([copy.deepcopy(base).to(dtype)])
    config = peft.LoraConfig(**{"target_modules": ["0"], "r": 4, "lora_alpha": 6, **options})
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    for seed, (_, factor) in enumerate(factors(layer).items()):
        values = torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed)) / 2
        factor.data = values.to(adapter_dtype)
    return layer


def ours(kind: type[FusedLoraLayer], layer: Any) -> FusedLoraLayer:
    """Our layer of the same values as PEFT's."""
    A, B = factors(layer).values()
    options = {"lora_dropout": getattr(layer.lora_dropout["default"], "p", 0.0), "adapter_dtype": A.dtype}
    own = kind.from_module(copy.deepcopy(layer.base_layer), layer.r["default"], layer.lora_alpha["default"], **options)
    with torch.no_grad():
        for factor, value in zip(own.factors, (A, B), strict=True):
            factor.copy_(value)
    return own.train(layer.training)


def factors(layer: Any) -> dict[str, nn.Parameter]:
    """A and B of a layer, ours or PEFT's with one adapter."""
    if isinstance(layer, FusedLoraLayer):
        return dict(zip("AB", layer.factors, strict=True))
    return dict(zip("AB", (p for name, p in layer.named_parameters() if "lora_" in name), strict=True))


def results(layer: Any, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """y and the gradients for the output gradient dy (default: random): dA, dB, dx of an x that is no ids, dbias."""
    bias = getattr(layer, "base_layer", layer).bias if hasattr(getattr(layer, "base_layer", layer), "bias") else None
    leaves: dict[str, Tensor] = {f"d{name}": factor for name, factor in factors(layer).items()}
    if x.is_floating_point():
        leaves["dx"] = x = x.detach().requires_grad_()
    if bias is not None:
        leaves["dbias"] = bias.requires_grad_()
    y = layer(x)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_as_accurate(own: FusedLoraLayer, layer: Any, x: Tensor) -> None:
    """The oracle's rule for every result, with PEFT in float64 for the truth and PEFT in the same dtypes for eager."""
    dtype, adapter_dtype = layer.base_layer.weight.dtype, factors(layer)["A"].dtype
    eager = results(layer, x)
    dy = torch.randn(eager["y"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = copy.deepcopy(layer).double()
    truth = results(exact, x.double() if x.is_floating_point() else x, dy)
    found = results(own, x, dy)
    assert found.keys() == truth.keys()
    case = oracle.Case((1, 1, 1), dtype=dtype, adapter_dtype=adapter_dtype)
    rows = [oracle.judge(case, name, found[name], eager[name], truth[name]) for name in truth]
    assert all(row.passed for row in rows), "\n" + oracle.table(rows)
