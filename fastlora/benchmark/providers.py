"""What is compared: every way to compute the linear that this machine can run, and the mask that each of them draws."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import dropout, oracle
from fastlora.benchmark import baselines
from fastlora.functional import available_backends, dropout_mask, lora_linear

FROZEN, EAGER = "frozen linear", "eager LoRA"  # ratios are relative to these two
#: Every provider, in the order of the tables.
NAMES = (
    FROZEN,
    EAGER,
    "PEFT",
    "chained addmm_",
    "compiled eager",
    "compiled PEFT",
    "fastlora fused",
    "fastlora addmm",
    "fastlora",
    "compiled fastlora",
)
COMPILERS = ("inductor", "aot_eager")

Forward = Callable[[Tensor], Tensor]
Mask = Callable[[int, int, float, torch.device], Tensor]


def fastlora_mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
    """The mask that lora_linear uses when it draws its own seed."""
    return dropout_mask(dropout.draw_seed(device), rows, cols, p)


def torch_mask(function: Callable[[Tensor, float], Tensor], dtype: torch.dtype) -> Mask:
    """The mask that function(x, p) draws, F.dropout say, for x in `dtype`."""
    return lambda rows, cols, p, device: function(torch.ones(rows, cols, dtype=dtype, device=device), p) != 0


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
    compiled: bool = False


def of_call(call: Callable[..., Tensor]) -> Callable[[oracle.Weights, float, float], Forward]:
    """`bind` of call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p)."""
    return lambda weights, scaling, dropout_p: lambda x: call(x, *weights, scaling=scaling, dropout_p=dropout_p)


def compiled(provider: Provider, name: str, compiler: str) -> Provider:
    """`provider` under torch.compile.

    Inductor draws other random numbers than eager torch.  So the mask is drawn by a compiled function too, from the same state
    of the generator and as the first random operation of its graph.
    """
    compile_: Callable[[Any], Any] = partial(torch.compile, backend=compiler, dynamic=False)

    def bind(*args: Any) -> Forward:
        return compile_(provider.bind(*args))

    return replace(provider, name=name, bind=bind, mask=compile_(provider.mask), compiled=True)


def providers_for(case: oracle.Case, device: torch.device, *, compiler: str | None = None) -> list[Provider]:
    """Those of NAMES that can compute `case` on `device`, in that order.

    `compiler`, one of COMPILERS, adds the providers under torch.compile.  Chained addmm_ needs adapters in x's dtype, PEFT's
    layer needs the package, and fastlora's two forms need a GPU that runs the kernels.
    """
    mask = torch_mask(F.dropout, case.adapters)
    rivals = [
        Provider(FROZEN, of_call(baselines.frozen_linear), outputs=("y", "dx")),
        Provider(EAGER, of_call(baselines.eager_lora), mask, baselines.keep_scale),
        Provider("fastlora", of_call(lora_linear)),
    ]
    if importlib.util.find_spec("peft") is not None:
        rivals.append(Provider("PEFT", baselines.peft_layer, mask, baselines.keep_scale))
    if compiler:
        rivals += [compiled(rival, f"compiled {rival.name.removesuffix(' LoRA')}", compiler) for rival in rivals[1:]]
    if case.adapters == case.dtype:
        native = torch_mask(lambda x, p: torch.native_dropout(x, p, True)[0], case.dtype)  # on a CPU, not F.dropout's mask
        rivals.append(Provider("chained addmm_", of_call(baselines.chained_addmm), native, baselines.keep_scale))
    if device.type == "cuda" and "triton" in available_backends(device):
        rivals += [Provider(f"fastlora {form}", of_call(partial(lora_linear, backend=form))) for form in ("fused", "addmm")]
    return sorted(rivals, key=lambda rival: NAMES.index(rival.name))
