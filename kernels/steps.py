"""The LoRA linear on Triton kernels: the order of the steps.  Each kernel's file holds its mathematics and its launcher.

    project.py   S = drop(x) Aᵀ                                forward 1
    gemm.py      y = x Wᵀ + bias + scaling · S Bᵀ              forward 2
    grad_b.py    dS = scaling · dy B, dB = scaling · dyᵀ S     backward 1
    outer.py     dA = dSᵀ drop(x), and the packed mask         backward 2
    gemm.py      dx = dy W + mask(dS A)                        backward 3

In the form "addmm" forward 2 and backward 3 are left to the vendor's GEMM, which accumulates onto the rank-r term that
gemm.py or, in its pass over x, outer.py has written.  forms.py says which form is taken where; dropout.py (mask), dot.py
(mixed-precision dots), sums.py (results in parts) and config.py (tiles) serve all of them; target.py tells GPUs apart.

What a step launches follows from the layouts of its operands: plans.py works it out once for them, launch.py runs it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastlora import choices, torch_backend
from fastlora.dropout import keep_scale
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import pack_bits
from fastlora.kernels.forms import Choice
from fastlora.kernels.gemm import gemm
from fastlora.kernels.grad_a import grad_a
from fastlora.kernels.grad_b import grad_s_and_b
from fastlora.kernels.plans import plan_backward, plan_forward
from fastlora.kernels.shrink import shrink
from fastlora.kernels.sums import sum_partials
from fastlora.kernels.target import Target, target_of
from fastlora.kernels.tensor_spec import TensorSpec

_HERE = nullcontext()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


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
        form, plans = plan_forward(
            *TensorSpec.of_each(x, weight, lora_A, lora_B, bias),
            seed is not None,
            matmul_precision(x.dtype),
            choice,
            choices.revision(),
            target or target_of(x.device),
        )
        if form == "torch":
            return torch_backend.forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
        S = shrink(plans["S"], x, lora_A, seed=seed, dropout_p=dropout_p)
        (S,) = sum_partials(plans["sum S"], S)
        if form == "fused":
            return gemm(plans["y"], x, weight, S, lora_B, alpha=scaling, bias=bias), S
        return gemm(plans["y"], None, None, S, lora_B, alpha=scaling, bias=bias).addmm_(x, weight.t()), S


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
        S = None if S is None else S.contiguous()
        form, plans = plan_backward(
            *TensorSpec.of_each(dy, x, weight, lora_A, lora_B, S),
            seed is not None,
            adapter_dtype,
            matmul_precision(dy.dtype),
            choice,
            choices.revision(),
            target or target_of(dy.device),
        )
        if form == "torch":
            return torch_backend.backward(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype)
        dS = dB = dA = bits = term = None
        if lora_B is not None and S is not None and "dS dB" in plans:
            dS, dB = grad_s_and_b(plans["dS dB"], dy, lora_B, S, scaling=scaling)
        else:
            dS = None if lora_B is None else shrink(plans["dS"], dy, lora_B, scaling=scaling)
            dB = None if S is None else grad_a(plans["dB"], dy, S, scaling=scaling)[0]
        (dS,) = sum_partials(plans["sum dS"], dS)
        if x is not None and dS is not None:
            dA, bits, term = grad_a(plans["dA"], x, dS, lora_A, seed=seed, dropout_p=dropout_p)
        dA, dB = sum_partials(plans["sum dA dB"], dA, dB)
        if weight is None or lora_A is None or dS is None:
            return None, dA, dB
        if seed is not None and "bits" in plans:
            bits = pack_bits(plans["bits"], seed, dropout_p)
        alpha = 1.0 if seed is None else keep_scale(dropout_p)
        if form == "fused":
            return gemm(plans["dx"], dy, weight, dS, lora_A, alpha=alpha, bits=bits), dA, dB
        if term is None:
            term = gemm(plans["dx"], None, None, dS, lora_A, alpha=alpha, bits=bits)
        return term.addmm_(dy, weight), dA, dB
