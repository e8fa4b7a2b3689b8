"""Who is compared: every way to compute the linear that this machine can run, with the mask each of them draws."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import dropout, oracle
from fastlora.benchmark import baselines
from fastlora.functional import available_backends, dropout_mask, lora_linear

#: Every provider, in the order of the tables.
NAMES = (
    "frozen linear",
    "eager LoRA",
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


class Weights(NamedTuple):
    """The tensors of a linear besides x: W (N, K) and bias (N,) or None frozen, A (r, K) and B (N, r) trained."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias: Tensor | None


Forward = Callable[[Tensor], Tensor]
Call = Callable[..., Tensor]
Mask = Callable[[int, int, float, torch.device], Tensor]


def fastlora_mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
    """The mask that lora_linear takes when it draws its own seed."""
    return dropout_mask(dropout.draw_seed(device), rows, cols, p)


@cache
def torch_mask(dtype: torch.dtype) -> Mask:
    """The mask that F.dropout draws for x in `dtype`."""

    def mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
        return F.dropout(torch.ones(rows, cols, dtype=dtype, device=device), p) != 0

    return mask


@cache
def native_mask(dtype: torch.dtype) -> Mask:
    """The mask that torch.native_dropout draws for x in `dtype`: on a CPU another one than F.dropout's."""

    def mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
        return torch.native_dropout(torch.ones(rows, cols, dtype=dtype, device=device), p, True)[1]

    return mask


def torch_keep_scale(p: float) -> float:
    """The factor that torch's dropout puts on kept elements."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@dataclass(frozen=True)
class Provider:
    """A way to compute the linear: bind(weights, scaling, dropout_p)(x) -> y.

    The bound function draws its mask from torch's default generator, as in training.  mask(rows, cols, p, device), run from the
    same state of the generator, is the mask that it drew, and keep_scale(p) the factor on kept elements: with both, the very
    function that is timed can be judged.  `adapted` is False for the frozen linear alone, which is y = x Wᵀ + bias.
    """

    name: str
    bind: Callable[[Weights, float, float], Forward]
    mask: Mask = fastlora_mask
    keep_scale: Callable[[float], float] = dropout.keep_scale
    adapted: bool = True
    compiled: bool = False

    @property
    def gradients(self) -> tuple[str, ...]:
        """What its backward computes."""
        return ("dx", "dA", "dB") if self.adapted else ("dx",)


def of_call(call: Call) -> Callable[[Weights, float, float], Forward]:
    """`bind` of call(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p)."""

    def bind(weights: Weights, scaling: float, dropout_p: float) -> Forward:
        return lambda x: call(x, *weights, scaling=scaling, dropout_p=dropout_p)

    return bind


def _bind_peft(weights: Weights, scaling: float, dropout_p: float) -> Forward:
    return baselines.peft_layer(*weights, scaling=scaling, dropout_p=dropout_p)


def compiled(provider: Provider, name: str, compiler: str) -> Provider:
    """`provider` under torch.compile.

    Inductor draws other random numbers than eager torch: so is the mask, or here the seed of it, which is drawn by a compiled
    function too, from the same state of the generator and as the first random operation of its graph.
    """
    options: dict[str, Any] = {"backend": compiler, "dynamic": False}

    def bind(weights: Weights, scaling: float, dropout_p: float) -> Forward:
        return torch.compile(provider.bind(weights, scaling, dropout_p), **options)

    def mask(rows: int, cols: int, p: float, device: torch.device) -> Tensor:
        if provider.mask is not fastlora_mask:
            return torch.compile(provider.mask, **options)(rows, cols, p, device)
        return dropout_mask(torch.compile(dropout.draw_seed, **options)(device), rows, cols, p)

    return replace(provider, name=name, bind=bind, mask=mask, compiled=True)


def providers_for(case: oracle.Case, device: torch.device, *, compiler: str | None = None) -> list[Provider]:
    """Those of NAMES that can compute `case` on `device`, in that order.

    The ones under torch.compile take part when `compiler`, one of COMPILERS, is given.  Chained addmm_ needs adapters in x's
    dtype, PEFT's layer the package, and the two forms of the kernels a GPU that runs them.
    """
    mask = torch_mask(case.adapters)
    frozen = Provider("frozen linear", of_call(baselines.frozen_linear), adapted=False)
    eager = Provider("eager LoRA", of_call(baselines.eager_lora), mask, torch_keep_scale)
    peft = Provider("PEFT", _bind_peft, mask, torch_keep_scale)
    chained = Provider("chained addmm_", of_call(baselines.chained_addmm), native_mask(case.dtype), torch_keep_scale)
    fast = Provider("fastlora", of_call(lora_linear))
    kernels = device.type == "cuda" and "triton" in available_backends(device)
    has_peft = importlib.util.find_spec("peft") is not None
    rivals = [frozen, eager]
    rivals += [peft] * has_peft
    rivals += [chained] * (case.adapters == case.dtype)
    if compiler:
        rivals.append(compiled(eager, "compiled eager", compiler))
        rivals += [compiled(peft, "compiled PEFT", compiler)] * has_peft
    if kernels:
        rivals += [Provider(f"fastlora {form}", of_call(partial(lora_linear, backend=form))) for form in ("fused", "addmm")]
    rivals.append(fast)
    if compiler:
        rivals.append(compiled(fast, "compiled fastlora", compiler))
    return rivals
