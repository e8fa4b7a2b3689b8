"""The middle and the last linear of a gated MLP on Triton kernels, y = down(act(e) · g) with e = gate(x) and g = up(x).

    gated.py    h = act(e) · g, S = drop(h) Aᵀ                forward 1
    gemm.py     y = h Wᵀ + bias + scaling · S Bᵀ              forward 2
    grad_b.py   dS = scaling · dy B, dB = scaling · dyᵀ S     backward 1
    cuBLAS      dh = dy W                                     backward 2
    gated.py    de, dg and dA, with dh + mask(dS A)           backward 3

Forward 2 has the two forms of steps.py.  In backward the LoRA term of dh costs no memory traffic: the pass that reads dh adds
it.  h is written in forward and not kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code
from fastlora.kernels.gated import gated, gated_backward, plan_gated, plan_gated_backward
from fastlora.kernels.launch import Plan
from fastlora.kernels.steps import Run, on_device, plan_dS_dB, plan_y
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import Target, target_of
from fastlora.kernels.tensor_spec import TensorSpec


def forward(
    e: Tensor,
    g: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    activation: str,
    out: Tensor,
    *,
    choice: str,
    target: Target | None = None,
    plan: Callable[..., Run] = plan_y,
) -> Tensor:
    """S (M, r) float32 of contiguous e and g (M, K); y (M, out) goes to `out`, contiguous.

    Args:
        lora_A, lora_B: both None where down has no adapter; S is then (M, 0) and cuBLAS makes y.
        choice: "fused", "fused/<tile>" or "addmm", the form of y.
        target: the GPU to plan for; default: e's.
        plan: what resolves the choice.
    """
    with on_device(e.device):
        target, precision = target or target_of(e.device), matmul_precision(e.dtype)
        mask = mask_code(dropout_p, seed, target)
        to_h, sum_S = _plan_h(target, precision, mask, activation, *TensorSpec.of_each(e, g, lora_A))
        h, S = gated(to_h, e, g, lora_A, seed=seed, dropout_p=dropout_p)
        if lora_B is None:
            torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)
            return h.new_empty((h.shape[0], 0), dtype=torch.float32)
        (S,) = sum_partials(sum_S, S)
        to_y = plan(choice, target, precision, mask, *TensorSpec.of_each(h, weight, lora_B, bias))
        to_y(h, weight, lora_B, bias, S, scaling, out)
        return S


def backward(
    dy: Tensor,
    e: Tensor,
    g: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    activation: str,
    *,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(de, dg, dA, dB) of dy (M, out); dA and dB in the adapter's dtype, None where there is none.

    Args: as in `forward`; S is its result.
    """
    with on_device(dy.device):
        target, precision = target or target_of(dy.device), matmul_precision(dy.dtype)
        mask = mask_code(dropout_p, seed, target)
        facts = target, precision, mask, activation
        run = _plan_backward(*facts, *TensorSpec.of_each(dy, e, g, lora_A, lora_B, S))
        return run(dy, e, g, weight, lora_A, lora_B, S, seed, scaling, dropout_p)


@functools.lru_cache(maxsize=4096)
def _plan_h(target: Target, precision: str, mask: str, activation: str, e: Any, g: Any, lora_A: Any) -> tuple[Plan, Plan]:
    to_h = plan_gated(e, lora_A, activation, mask, precision, target)
    return to_h, plan_sum(to_h.results[1])


@functools.lru_cache(maxsize=4096)
def _plan_backward(target: Target, precision: str, mask: str, activation: str, *specs: Any) -> Run:
    """The function that runs backward.  specs: those of dy, e, g, lora_A, lora_B and S."""
    dy, e, _, lora_A, lora_B, S = specs
    to_gates = plan_gated_backward(e, lora_A, activation, mask, precision, target)
    if lora_B is None:

        def run_without_adapter(dy, e, g, weight, lora_A, lora_B, S, seed, scaling, dropout_p):
            de, dg, _ = gated_backward(to_gates, dy @ weight, e, g, None, None)
            return de, dg, None, None

        return run_without_adapter
    to_dS_dB, (dS_result, dB_result) = plan_dS_dB(target, precision, lora_B.dtype, dy, lora_B, S)
    sum_dS, sum_dA_dB = plan_sum(dS_result), plan_sum(to_gates.results[1], dB_result)

    def run(dy, e, g, weight, lora_A, lora_B, S, seed, scaling, dropout_p):
        dS, dB = to_dS_dB(dy, lora_B, S, scaling)
        (dS,) = sum_partials(sum_dS, dS)
        de, dg, dA = gated_backward(to_gates, dy @ weight, e, g, dS, lora_A, seed=seed, dropout_p=dropout_p)
        return de, dg, *sum_partials(sum_dA_dB, dA, dB)

    return run
