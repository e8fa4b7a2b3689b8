"""The LoRA linear on Triton kernels: the order of the steps.  Each kernel's file holds its mathematics and its launcher.

    project.py   S = drop(x) Aᵀ                                forward 1
    gemm.py      y = x Wᵀ + bias + scaling · S Bᵀ              forward 2
    grad_b.py    dS = scaling · dy B, dB = scaling · dyᵀ S     backward 1
    outer.py     dA = dSᵀ drop(x), and the packed mask         backward 2
    gemm.py      dx = dy W + mask(dS A)                        backward 3

In the form "prefill" forward 2 and backward 3 are left to the vendor's GEMM, which accumulates onto the rank-r term that
gemm.py or, in its pass over x, outer.py has written.  forms.py says which form is taken where; dropout.py (mask), dot.py
(mixed-precision dots) and config.py (tiles) serve all of them; target.py tells GPUs apart.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastlora import choices, torch_backend
from fastlora.dropout import keep_scale
from fastlora.kernels.dropout import empty_bits, pack_bits
from fastlora.kernels.forms import Choice, Problem, bucket
from fastlora.kernels.gemm import gemm
from fastlora.kernels.grad_b import MAX_RANK, grad_s_and_b
from fastlora.kernels.outer import outer
from fastlora.kernels.project import project
from fastlora.kernels.target import Target, target_of


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    *,
    choice: Choice | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (M, out) in x's dtype, S (M, r) float32) of 2-D x (M, in); the form is chosen from the shape when not given."""
    with _on(x.device):
        target = target or target_of(x.device)
        choice = choice or _choose("forward", x, weight, lora_A.shape[0], seed, target)
        if choice.form == "torch":
            return torch_backend.forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
        S = project(x, lora_A, target, seed=seed, dropout_p=dropout_p)
        W_t, B_t = weight.t(), lora_B.t()
        if choice.form == "fused":
            return gemm(x, W_t, S, B_t, x.dtype, target, alpha=scaling, bias=bias, config=choice.config), S
        return gemm(None, None, S, B_t, x.dtype, target, alpha=scaling, bias=bias).addmm_(x, W_t), S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    *,
    choice: Choice | None = None,
    target: Target | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), each computed where its operands are given: dx from weight and lora_A, dA from x, dB from S."""
    with _on(dy.device):
        target = target or target_of(dy.device)
        fused = False
        if weight is not None and lora_A is not None:
            choice = choice or _choose("backward", dy, weight, lora_A.shape[0], seed, target)
            fused = choice.form == "fused"
            if choice.form == "torch":
                return torch_backend.backward(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype)
        dS, dB = _grad_s_and_b(dy, lora_B, None if S is None else S.contiguous(), scaling, adapter_dtype, target)
        dA = bits = dx = None
        if x is not None and dS is not None:
            bits = empty_bits(x.shape, x.device) if fused and seed is not None else None
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if weight is not None and not fused else None
            V = None if dx is None else lora_A
            dA = outer(x, dS, adapter_dtype, target, seed=seed, dropout_p=dropout_p, bits=bits, V=V, C=dx)
        if weight is None or lora_A is None or dS is None or choice is None:
            return None, dA, dB
        if x is None and seed is not None:
            bits = pack_bits(seed, dy.shape[0], weight.shape[1], dropout_p)
        alpha = keep_scale(dropout_p)
        if fused:
            return gemm(dy, weight, dS, lora_A, dy.dtype, target, alpha=alpha, bits=bits, config=choice.config), dA, dB
        dx = gemm(None, None, dS, lora_A, dy.dtype, target, alpha=alpha, bits=bits) if dx is None else dx
        return dx.addmm_(dy, weight), dA, dB


def _choose(direction: str, rows: Tensor, weight: Tensor, r: int, seed: Tensor | None, target: Target) -> Choice:
    out_features, in_features = weight.shape
    return choices.choose(
        Problem(direction, rows.dtype, bucket(rows.shape[0]), in_features, out_features, r, seed is not None), target
    )


def _grad_s_and_b(
    dy: Tensor, lora_B: Tensor | None, S: Tensor | None, scaling: float, adapter_dtype: torch.dtype, target: Target
) -> tuple[Tensor | None, Tensor | None]:
    """Backward 1: both in one pass over dy up to rank MAX_RANK, each in its own above, and only what is asked for."""
    if lora_B is not None and S is not None and S.shape[1] <= MAX_RANK:
        return grad_s_and_b(dy, lora_B, S, adapter_dtype, target, scaling=scaling)
    dS = None if lora_B is None else project(dy, lora_B.t(), target, scaling=scaling)
    dB = None if S is None else outer(dy, S, adapter_dtype, target, transposed=True, scaling=scaling)
    return dS, dB
