"""What is compared: every way to compute the linear that this machine can run, and the mask that each of them draws.

The other implementations are the frozen linear alone, eager LoRA, PEFT's own layer, and chained addmm_.  They are called as
call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p) -> y with x (M, K), weight (N, K), lora_A (r, K), lora_B (N, r).
Masks come from torch's default generator, as in training.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import dropout, oracle, reference
from fastlora.backends import available_backends
from fastlora.functional import dropout_mask, lora_linear

FROZEN, EAGER = "frozen linear", "eager LoRA"  # ratios are relative to these two
#: Under torch.compile -> the provider that is compiled.
COMPILED = {"compiled eager": EAGER, "compiled PEFT": "PEFT", "compiled fastlora": "fastlora"}
#: Every provider, in the order of the tables.
NAMES = (FROZEN, EAGER, "PEFT", "chained addmm_", "fastlora fused", "fastlora addmm", "fastlora", *COMPILED)
COMPILERS = ("inductor", "aot_eager")

Forward = Callable[[Tensor], Tensor]
Mask = Callable[[int, int, float, torch.device], Tensor]


def fastlora_mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
    """The mask that lora_linear uses when it draws its own seed."""
    return dropout_mask(dropout.draw_seed(device), rows, cols, p)


def torch_mask(function: Callable[[Tensor, float], Tensor], dtype: torch.dtype) -> Mask:
    """The mask that function(x, p) draws, F.dropout say, for x in `dtype`."""
    return lambda rows, cols, p, device: function(torch.ones(rows, cols, dtype=dtype, device=device), p) != 0


def torch_keep_scale(p: float) -> float:
    """The factor that torch's dropout applies to kept elements."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@dataclass(frozen=True)
class Provider:
    """A way to compute the linear: bind(weights, scaling, dropout_p)(x) -> y.

    The bound function draws its mask from torch's default generator, as in training.  From the same state of the generator,
    mask(rows, cols, p, device) returns the mask that it draws; keep_scale(p) is the factor on kept elements.  With both, the
    oracle can judge the very function that is timed.  `outputs` are y and the gradients that its backward computes.
    """

    name: str
    bind: Callable[[oracle.Weights, float, float], Forward]
    mask: Mask = fastlora_mask
    keep_scale: Callable[[float], float] = dropout.keep_scale
    outputs: tuple[str, ...] = ("y", "dx", "dA", "dB")


def of_call(call: Callable[..., Tensor]) -> Callable[[oracle.Weights, float, float], Forward]:
    """`bind` of call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p)."""
    return lambda weights, scaling, dropout_p: lambda x: call(x, *weights, scaling=scaling, dropout_p=dropout_p)


def providers_for(case: oracle.Case, device: torch.device, *, compiler: str | None = None) -> list[Provider]:
    """Those of NAMES that can compute `case` on `device`, in that order.

    `compiler`, one of COMPILERS, adds the providers under torch.compile.  Chained addmm_ needs adapters in x's dtype, PEFT's
    layer needs the package, and fastlora's two forms need a GPU that runs the kernels.
    """
    mask = torch_mask(F.dropout, case.adapters)
    rivals = [
        Provider(FROZEN, of_call(frozen_linear), outputs=("y", "dx")),
        Provider(EAGER, of_call(eager_lora), mask, torch_keep_scale),
    ]
    if importlib.util.find_spec("peft") is not None:
        rivals.append(Provider("PEFT", peft_layer, mask, torch_keep_scale))
    if case.adapters == case.dtype:
        native = torch_mask(lambda x, p: torch.native_dropout(x, p, True)[0], case.dtype)  # on a CPU, not F.dropout's mask
        rivals.append(Provider("chained addmm_", of_call(chained_addmm), native, torch_keep_scale))
    if device.type == "cuda" and "triton" in available_backends(device):
        rivals += [Provider(f"fastlora {form}", of_call(partial(lora_linear, backend=form))) for form in ("fused", "addmm")]
    rivals.append(Provider("fastlora", of_call(lora_linear)))
    if compiler:
        plain = {rival.name: rival for rival in rivals}
        rivals += [_compiled(plain[of], name, compiler) for name, of in COMPILED.items() if of in plain]
    return rivals


def _compiled(provider: Provider, name: str, compiler: str) -> Provider:
    """`provider` under torch.compile.

    Inductor draws other random numbers than eager torch.  So the mask is drawn by a compiled function too, from the same state
    of the generator and as the first random operation of its graph.
    """
    compile_: Callable[[Any], Any] = partial(torch.compile, backend=compiler, dynamic=False)
    return replace(provider, name=name, bind=lambda *args: compile_(provider.bind(*args)), mask=compile_(provider.mask))


def frozen_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: float) -> Tensor:
    """y = x Wᵀ + bias: the lower limit."""
    return F.linear(x, weight, bias)


def eager_lora(*tensors: Any, scaling: float, dropout_p: float) -> Tensor:
    """What PEFT's layer computes in training mode: torch's dropout, two linears, one add, one cast."""
    drop = partial(F.dropout, p=dropout_p) if dropout_p else None
    return reference.lora_linear(*tensors, scaling=scaling, dropout=drop)


def peft_layer(weights: oracle.Weights, scaling: float, dropout_p: float) -> nn.Module:
    """A `peft.tuners.lora.layer.Linear` with these weights, in training mode.

    Raises:
        ImportError: PEFT is not installed.
    """
    import peft

    weight, lora_A, lora_B, bias = weights
    base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    config = peft.LoraConfig(r=len(lora_A), lora_dropout=dropout_p, target_modules=["linear"])
    layer: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": base})).linear
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    for module, name, tensor in ((base, "weight", weight), (base, "bias", bias), (A, "weight", lora_A), (B, "weight", lora_B)):
        delattr(module, name)  # a parameter, which only another parameter could replace
        setattr(module, name, tensor)
    layer.scaling["default"] = scaling
    return layer.train()


class _ChainedAddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, lora_A, lora_B, bias, scaling, dropout_p = rest
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p > 0 else (x, None)
        S = dropped @ lora_A.t()
        ctx.save_for_backward(dropped, mask, weight, lora_A, lora_B, S)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return F.linear(x, weight, bias).addmm_(S, lora_B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dropped, mask, weight, lora_A, lora_B, S = ctx.saved_tensors
        dS = (dy @ lora_B).mul_(ctx.scaling)
        dB = (dy.t() @ S).mul_(ctx.scaling)
        dA = dS.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dS, lora_A)
        else:
            dx.addcmul_(dS @ lora_A, mask, value=torch_keep_scale(ctx.dropout_p))
        return dx, None, dA, dB, None, None, None


def chained_addmm(*tensors: Tensor | None, scaling: float, dropout_p: float) -> Tensor:
    """y = x Wᵀ + bias, then y += scaling · S Bᵀ in place, and dx likewise, as Unsloth and Axolotl do it.

    All tensors share one dtype.  As in Axolotl, the dropped x and the mask are saved for backward.
    """
    return _ChainedAddmm.apply(*tensors, scaling, dropout_p)
