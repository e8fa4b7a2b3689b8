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
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code
from fastlora.kernels.gated import gated, gated_backward, plan_gated, plan_gated_backward
from fastlora.kernels.gemm import gemm, plan_gemm
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.grad_b import MAX_RANK, grad_s_and_b, plan_grad_s_and_b
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.steps import Run, _on, _or_addmm, parse_choice
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
) -> Tensor:
    """S (M, r) float32 of contiguous e and g (M, K); y (M, out) goes to `out`, contiguous.

    Args:
        lora_A, lora_B: both None where down has no adapter; S is then (M, 0).
        choice: "fused", "fused/<tile>" or "addmm", as in `steps.forward`.
        target: the GPU to plan for; default: e's.
    """
    with _on(e.device):
        target = target or target_of(e.device)
        facts = target, matmul_precision(e.dtype), mask_code(dropout_p, seed, target), activation
        run = plan_forward(choice, *facts, *TensorSpec.of_each(e, g, weight, lora_A, lora_B, bias))
        return run(e, g, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, out)


@functools.lru_cache(maxsize=4096)
def plan_forward(choice: str, target: Target, precision: str, mask: str, activation: str, *specs: Any) -> Run:
    """The function that runs forward.  specs: those of e, g, weight, lora_A, lora_B and bias."""
    e, _, weight, lora_A, lora_B, bias = specs
    fused, config = parse_choice(choice, e.dtype, precision, target)
    to_h = plan_gated(e, lora_A, activation, mask, precision, target)
    sum_S = plan_sum(to_h.results[1])
    to_y = None
    if lora_B is not None:
        U, h = TensorSpec.new(*to_h.results[1].shape, dtype=torch.float32), TensorSpec.new(*e.shape, dtype=e.dtype)
        P, Q = (h, weight.t()) if fused else (None, None)
        to_y = plan_gemm(P, Q, U, lora_B.t(), e.dtype, precision, target, bias=bias, config=config)

    def run(e, g, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, out):
        h, S = gated(to_h, e, g, lora_A, seed=seed, dropout_p=dropout_p)
        if to_y is None:
            torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)
            return h.new_empty((h.shape[0], 0), dtype=torch.float32)
        (S,) = sum_partials(sum_S, S)
        P, Q = (h, weight) if fused else (None, None)
        gemm(to_y, P, Q, S, lora_B, alpha=scaling, bias=bias, out=out)
        if not fused:
            out.addmm_(h, weight.t())
        return S

    return _or_addmm(run, plan_forward, target, precision, mask, activation, *specs) if choice == "fused" else run


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
    with _on(dy.device):
        target = target or target_of(dy.device)
        facts = target, matmul_precision(dy.dtype), mask_code(dropout_p, seed, target), activation
        run = plan_backward(*facts, *TensorSpec.of_each(dy, e, g, lora_A, lora_B, S))
        return run(dy, e, g, weight, lora_A, lora_B, S, seed, scaling, dropout_p)


@functools.lru_cache(maxsize=4096)
def plan_backward(target: Target, precision: str, mask: str, activation: str, *specs: Any) -> Run:
    """The function that runs backward.  specs: those of dy, e, g, lora_A, lora_B and S."""
    dy, e, _, lora_A, lora_B, S = specs
    to_gates = plan_gated_backward(e, lora_A, activation, mask, precision, target)
    to_dS_dB = to_dS = to_dB = sum_dS = sum_grads = None
    if lora_B is not None:
        if S.shape[1] <= MAX_RANK:
            to_dS_dB = plan_grad_s_and_b(dy, lora_B, S, lora_B.dtype, precision, target)
            dS_result, dB_result = to_dS_dB.results
        else:
            to_dS = plan_shrink(dy, lora_B.t(), "", precision, target)
            to_dB = plan_grad_a(dy, S, lora_B.dtype, precision, target, transposed=True)
            dS_result, dB_result = to_dS.results[0], to_dB.results[0]
        sum_dS, sum_grads = plan_sum(dS_result), plan_sum(to_gates.results[1], dB_result)

    def run(dy, e, g, weight, lora_A, lora_B, S, seed, scaling, dropout_p):
        dS = dB = None
        if to_dS_dB:
            dS, dB = grad_s_and_b(to_dS_dB, dy, lora_B, S, scaling=scaling)
        elif to_dS and to_dB:
            dS = shrink(to_dS, dy, lora_B, scaling=scaling)
            dB, _ = grad_a(to_dB, dy, S, scaling=scaling)
        if sum_dS:
            (dS,) = sum_partials(sum_dS, dS)
        de, dg, dA = gated_backward(to_gates, dy @ weight, e, g, dS, lora_A, seed=seed, dropout_p=dropout_p)
        if sum_grads is None:
            return de, dg, None, None
        return de, dg, *sum_partials(sum_grads, dA, dB)

    return run
