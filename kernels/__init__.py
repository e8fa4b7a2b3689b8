"""The fused LoRA linear on Triton kernels: the order of the steps.  Each kernel's file holds its mathematics and its launcher.

    project.py   S = drop(x) Aᵀ                        forward 1
    gemm.py      y = x Wᵀ + bias + scaling · S Bᵀ      forward 2
    grad_b.py    dS = scaling · dy B, dB = scaling · dyᵀ S     backward 1
    outer.py     dA = dSᵀ drop(x), and the packed mask         backward 2
    gemm.py      dx = dy W + mask(dS A)                        backward 3

dropout.py (mask), dot.py (mixed-precision dots) and config.py (tiles) serve all of them; target.py tells GPUs apart.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.kernels.dropout import pack_bits
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
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (M, out) in x's dtype, S (M, r) float32) of 2-D x (M, in)."""
    with _on(x.device):
        target = target or target_of(x.device)
        S = project(x, lora_A, target, seed=seed, dropout_p=dropout_p)
        return gemm(x, weight.t(), S, lora_B.t(), target, alpha=scaling, bias=bias), S


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
    target: Target | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), each computed where its operands are given: dx from weight and lora_A, dA from x, dB from S."""
    with _on(dy.device):
        target = target or target_of(dy.device)
        S = None if S is None else S.contiguous()
        dS, dB = _grad_s_and_b(dy, lora_B, S, scaling, adapter_dtype, target)
        dA = bits = dx = None
        if x is not None and dS is not None:
            dA, bits = outer(x, dS, adapter_dtype, target, seed=seed, dropout_p=dropout_p, pack=weight is not None)
        if weight is not None and lora_A is not None and dS is not None:
            if bits is None and seed is not None:
                bits = pack_bits(seed, dy.shape[0], weight.shape[1], dropout_p)
            dx = gemm(dy, weight, dS, lora_A, target, alpha=keep_scale(dropout_p), bits=bits)
        return dx, dA, dB


def _grad_s_and_b(
    dy: Tensor, lora_B: Tensor | None, S: Tensor | None, scaling: float, adapter_dtype: torch.dtype, target: Target
) -> tuple[Tensor | None, Tensor | None]:
    """Backward 1: both in one pass over dy up to rank MAX_RANK, each in its own above, and only what is asked for."""
    if lora_B is not None and S is not None and S.shape[1] <= MAX_RANK:
        return grad_s_and_b(dy, lora_B, S, adapter_dtype, target, scaling=scaling)
    dS = None if lora_B is None else project(dy, lora_B.t(), target, scaling=scaling)
    dB = None if S is None else outer(dy, S, adapter_dtype, target, transposed=True, scaling=scaling)[0]
    return dS, dB
