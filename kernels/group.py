"""Forward and backward of projections that share x: each pass over x serves them all.

    shrink.py   Sᵢ = dropᵢ(x) Aᵢᵀ                                  one pass over x
    gemm.py     yᵢ = x Wᵢᵀ + biasᵢ + scalingᵢ · Sᵢ Bᵢᵀ             as for one linear
    grad_b.py   dSᵢ = scalingᵢ · dyᵢ Bᵢ, dBᵢ = scalingᵢ · dyᵢᵀ Sᵢ   as for one linear
    grad_a.py   dAᵢ = dSᵢᵀ dropᵢ(x), dx = Σ c · maskᵢ(dSᵢ Aᵢ)      one pass over x; without wgmma one for each i
    cuBLAS      dx += dyᵢ Wᵢ, in place

The projections have one rate of dropout, one dtype of adapters, and one rank: the caller pads A and B with zeros.  Forward
takes either form of `steps`.  dx has the form "addmm": with several masks, the fused GEMM would hold a second accumulator.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.launch import Plan
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.steps import Run, on_device, plan_dS_dB, plan_y
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import Target, target_of
from fastlora.kernels.tensor_spec import TensorSpec


def forward_shared(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Tensor,
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seed: Tensor | None,
    words: tuple[int, ...],
    scalings: Sequence[float],
    dropout_p: float,
    outs: Sequence[Tensor],
    *,
    choice: str,
    target: Target | None = None,
    plan: Callable[..., Run] = plan_y,
) -> Tensor:
    """S (n, M, r) float32 of n projections, their y in `outs`.

    Args:
        x: (M, in).  lora_A: (n · r, in).  words: the projection words of the masks.  outs: contiguous memory for each y.
        choice: "fused", "fused/<tile>" or "addmm", the form of each y.
        target: the GPU to plan for; default: x's.
        plan: what resolves the choice.
    """
    with on_device(x.device):
        target, precision = target or target_of(x.device), matmul_precision(x.dtype)
        mask = mask_code(dropout_p, seed, target)
        S = shrink_shared(x, lora_A, seed, words, dropout_p, target)
        for part, *operands, scaling, out in zip(S, weights, lora_Bs, biases, scalings, outs, strict=True):
            run = plan(choice, target, precision, mask, *TensorSpec.of_each(x, *operands))
            run(x, *operands, part, scaling, out)
        return S


def backward_shared(
    x: Tensor,
    dys: Sequence[Tensor],
    lora_A: Tensor,
    lora_Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    words: tuple[int, ...],
    scalings: Sequence[float],
    dropout_p: float,
    dx: Tensor | None,
    add: bool,
    *,
    target: Target | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(dA (n · r, in), each dB (out, r)) of n projections, in the adapters' dtype.

    dx (M, in), contiguous, gets the sum of their LoRA terms, added with `add` to what is there.  W is not multiplied.
    """
    with on_device(x.device):
        target, precision = target or target_of(x.device), matmul_precision(x.dtype)
        dSs, dBs = [], []
        for dy, lora_B, S, scaling in zip(dys, lora_Bs, Ss, scalings, strict=True):
            to_dS_dB, sum_dS_dB = _plan_dS_dB(target, precision, lora_B.dtype, *TensorSpec.of_each(dy, lora_B, S))
            dS, dB = sum_partials(sum_dS_dB, *to_dS_dB(dy, lora_B, S, scaling))
            dSs.append(dS)
            dBs.append(dB)
        return grad_a_shared(x, dSs, lora_A, seed, words, dropout_p, dx, add, target), dBs


def shrink_shared(
    x: Tensor, lora_A: Tensor, seed: Tensor | None, words: tuple[int, ...], dropout_p: float, target: Target | None = None
) -> Tensor:
    """S (n, M, r) float32 of x (M, in) and A (n · r, in), without dropout where seed is None."""
    with on_device(x.device):
        target = target or target_of(x.device)
        facts = target, matmul_precision(x.dtype), mask_code(dropout_p, seed, target), words
        to_S, sum_S = _plan_s(*facts, *TensorSpec.of_each(x, lora_A))
        (S,) = sum_partials(sum_S, shrink(to_S, x, lora_A, seed=seed, dropout_p=dropout_p))
        return S.view(len(words), x.shape[0], lora_A.shape[0] // len(words))


def grad_a_shared(
    x: Tensor,
    dSs: Sequence[Tensor],
    lora_A: Tensor,
    seed: Tensor | None,
    words: tuple[int, ...],
    dropout_p: float,
    dx: Tensor | None,
    add: bool,
    target: Target | None = None,
) -> Tensor:
    """dA (n · r, in) in A's dtype for n dS (M, r); dx as in `backward_shared`."""
    with on_device(x.device):
        target = target or target_of(x.device)
        facts = target, matmul_precision(x.dtype), mask_code(dropout_p, seed, target)
        # mma keeps operands in registers: three masks spill 136 bytes, or take tiles too small to pay (sm_80, Triton 3.7.1).
        n, at_once = len(dSs), len(dSs) if target.has_wgmma else 1
        dAs: list[Tensor] = []
        for first, A in zip(range(0, n, at_once), lora_A.chunk(n // at_once), strict=True):
            some, own = dSs[first : first + at_once], words[first : first + at_once]
            U, V = torch.cat(list(some)) if len(some) > 1 else some[0].contiguous(), None if dx is None else A
            to_dA, sum_dA = _plan_a(*facts, own, A.dtype, add or first > 0, *TensorSpec.of_each(x, U, V))
            dA, _ = grad_a(to_dA, x, U, V, seed=seed, dropout_p=dropout_p, dx=dx)
            dAs += sum_partials(sum_dA, dA)
        return torch.cat([dA.flatten(0, -2) for dA in dAs]) if len(dAs) > 1 else dAs[0].view(lora_A.shape)


@functools.lru_cache(maxsize=4096)
def _plan_s(target: Target, precision: str, mask: str, words: tuple[int, ...], x: Any, lora_A: Any) -> tuple[Plan, Plan]:
    to_S = plan_shrink(x, lora_A, mask, precision, target, words=words)
    return to_S, plan_sum(*to_S.results)


@functools.lru_cache(maxsize=4096)
def _plan_dS_dB(target: Target, precision: str, dtype: torch.dtype, *specs: Any) -> tuple[Run, Plan]:
    run, results = plan_dS_dB(target, precision, dtype, *specs)
    return run, plan_sum(*results)


@functools.lru_cache(maxsize=4096)
def _plan_a(
    target: Target, precision: str, mask: str, words: tuple[int, ...], dtype: torch.dtype, add: bool, x: Any, U: Any, V: Any
) -> tuple[Plan, Plan]:
    to_dA = plan_grad_a(x, U, dtype, precision, target, mask=mask, V=V, add=add, words=words)
    return to_dA, plan_sum(to_dA.results[0])
