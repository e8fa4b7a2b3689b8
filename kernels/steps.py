"""Forward and backward of the LoRA linear on Triton kernels: start here.  Each kernel's file holds its mathematics.

    shrink.py   S = drop(x) Aᵀ                                forward 1
    gemm.py     y = x Wᵀ + bias + scaling · S Bᵀ              forward 2
    grad_b.py   dS = scaling · dy B, dB = scaling · dyᵀ S     backward 1
    grad_a.py   dA = dSᵀ drop(x), and the packed mask         backward 2
    gemm.py     dx = dy W + mask(dS A)                        backward 3

This is the form "fused".  In the form "addmm" cuBLAS makes the two GEMMs, accumulating in place onto the LoRA term: gemm.py
writes that term in forward, grad_a.py in backward during its pass over x.  A choice names the form, and for "fused" perhaps
the tile of its GEMMs: "fused/128,256,64,32,8,3,8", the fields of `GemmConfig`.

What a step launches follows from the specs of its operands.  `plan_forward` and `plan_backward` decide it once and return the
function that runs the step.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastlora.dropout import keep_scale
from fastlora.kernels.config import GemmConfig, valid_tiles
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code, pack_bits, plan_pack_bits
from fastlora.kernels.gemm import gemm, plan_gemm
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.grad_b import MAX_RANK, grad_s_and_b, plan_grad_s_and_b
from fastlora.kernels.launch import Result
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import Target, target_of
from fastlora.kernels.tensor_spec import TensorSpec

FORMS = ("fused", "addmm")
_CURRENT_DEVICE = nullcontext()

Run = Callable[..., Any]  # runs a planned step on its tensors


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    out: Tensor | None = None,
    *,
    choice: str,
    target: Target | None = None,
    plan: Callable[..., Run] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (M, out) in x's dtype, S (M, r) float32) of a 2-D x (M, in).

    Args:
        out: contiguous memory for y.
        choice: "fused", "fused/<tile>" or "addmm".
        target: the GPU to plan for; default: x's.
        plan: what resolves the choice; default `plan_forward`.
    """
    with on_device(x.device):
        specs = TensorSpec.of_each(x, weight, lora_A, lora_B, bias)
        target = target or target_of(x.device)
        facts = target, matmul_precision(x.dtype), mask_code(dropout_p, seed, target)
        run = (plan or plan_forward)(choice, *facts, *specs)
        return run(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, out)


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
    out: Tensor | None = None,
    *,
    choice: str,
    target: Target | None = None,
    plan: Callable[..., Run] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB).  dx needs weight, lora_A and lora_B; dA needs x and lora_B; dB needs S.  None where an operand is missing.

    Args: `out` is contiguous memory for dx; the others are as in `forward`.
    """
    with on_device(dy.device):
        S = None if S is None else S.contiguous()
        specs = TensorSpec.of_each(dy, x, weight, lora_A, lora_B, S)
        target = target or target_of(dy.device)
        facts = target, matmul_precision(dy.dtype), mask_code(dropout_p, seed, target)
        run = (plan or plan_backward)(choice, *facts, adapter_dtype, *specs)
        return run(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype, out)


@functools.lru_cache(maxsize=4096)
def plan_forward(choice: str, target: Target, precision: str, mask: str, *specs: Any) -> Run:
    """The function that runs forward.  specs: those of x, weight, lora_A, lora_B and bias."""
    x, weight, lora_A, lora_B, bias = specs
    to_S = plan_shrink(x, lora_A, mask, precision, target)
    sum_S, to_y = plan_sum(*to_S.results), plan_y(choice, target, precision, mask, x, weight, lora_B, bias)

    def run(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, out):
        (S,) = sum_partials(sum_S, shrink(to_S, x, lora_A, seed=seed, dropout_p=dropout_p))
        return to_y(x, weight, lora_B, bias, S, scaling, out), S

    return run


@functools.lru_cache(maxsize=4096)
def plan_y(choice: str, target: Target, precision: str, mask: str, *specs: Any) -> Run:
    """The function of (x, W, B, bias, S, scaling, out) that makes y.  specs: those of x, W, B and bias.

    mask: that of S, which makes no difference here.  `fastlora.dispatch.plan_y`, which may stand in for this, chooses by it.
    """
    x, weight, lora_B, bias = specs
    fused, config = parse_choice(choice, x.dtype, precision, target)
    U = TensorSpec.new(x.shape[0], lora_B.shape[1], dtype=torch.float32)
    P, Q = (x, weight.t()) if fused else (None, None)
    plan = plan_gemm(P, Q, U, lora_B.t(), x.dtype, precision, target, bias=bias, config=config)

    def run(x, weight, lora_B, bias, S, scaling, out):
        if fused:
            return gemm(plan, x, weight, S, lora_B, alpha=scaling, bias=bias, out=out)
        return gemm(plan, None, None, S, lora_B, alpha=scaling, bias=bias, out=out).addmm_(x, weight.t())

    return _or_addmm(run, plan_y, target, precision, mask, *specs) if choice == "fused" else run


@functools.lru_cache(maxsize=4096)
def plan_backward(
    choice: str, target: Target, precision: str, mask: str, adapter_dtype: torch.dtype, *specs: TensorSpec | None
) -> Run:
    """The function that runs backward.  specs: those of dy, x, weight, lora_A, lora_B and S, None for what is missing.

    In the form "addmm" the pass of dA also writes dx's LoRA term; without dA, gemm.py does.
    """
    dy, x, weight, lora_A, lora_B, S = specs
    assert dy is not None
    fused, config = parse_choice(choice, dy.dtype, precision, target)
    to_dS_dB, (dS_result, dB_result) = plan_dS_dB(target, precision, adapter_dtype, dy, lora_B, S)
    to_dA = to_bits = to_dx = None
    needs_dx = lora_B is not None and weight is not None and lora_A is not None
    if lora_B is not None:
        U = TensorSpec.new(dy.shape[0], lora_B.shape[1], dtype=torch.float32)
        if x is not None:
            V = lora_A if needs_dx and not fused else None
            pack = needs_dx and fused and bool(mask)
            to_dA = plan_grad_a(x, U, adapter_dtype, precision, target, mask=mask, pack=pack, V=V)
        if weight is not None and lora_A is not None and (fused or x is None):
            if x is None and mask:
                to_bits = plan_pack_bits((dy.shape[0], weight.shape[1]), mask)
            P, Q = (dy, weight) if fused else (None, None)
            to_dx = plan_gemm(P, Q, U, lora_A, dy.dtype, precision, target, masked=bool(mask), config=config)
    sum_dS, sum_dA_dB = plan_sum(dS_result), plan_sum(to_dA.results[0] if to_dA else Result((), adapter_dtype), dB_result)

    def run(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, adapter_dtype, out):
        dx: Any = None
        dA = bits = None
        dS, dB = to_dS_dB(dy, lora_B, S, scaling)
        (dS,) = sum_partials(sum_dS, dS)
        if needs_dx:
            dx = dy.new_empty((dy.shape[0], weight.shape[1])) if out is None else out
        if to_dA:
            V, lora_term = (None, None) if to_dx or not needs_dx else (lora_A, dx)
            dA, bits = grad_a(to_dA, x, dS, V, seed=seed, dropout_p=dropout_p, dx=lora_term)
        dA, dB = sum_partials(sum_dA_dB, dA, dB)
        if to_bits:
            bits = pack_bits(to_bits, seed, dropout_p)
        if to_dx:
            P, Q = (dy, weight) if fused else (None, None)
            alpha = 1.0 if seed is None else keep_scale(dropout_p)
            gemm(to_dx, P, Q, dS, lora_A, alpha=alpha, bits=bits, out=dx)
        if needs_dx and not fused:
            dx.addmm_(dy, weight)
        return dx, dA, dB

    return _or_addmm(run, plan_backward, target, precision, mask, adapter_dtype, *specs) if choice == "fused" else run


def plan_dS_dB(
    target: Target, precision: str, adapter_dtype: torch.dtype, dy: TensorSpec, lora_B: TensorSpec | None, S: TensorSpec | None
) -> tuple[Run, tuple[Result, Result]]:
    """The function of (dy, B, S, scaling) that makes dS and dB, each perhaps in parts, and their results.

    Up to rank MAX_RANK one pass over dy gives both; above it each takes its own.  None for what is missing.
    """
    in_one_part = Result((), adapter_dtype)
    if lora_B is not None and S is not None and S.shape[1] <= MAX_RANK:
        to_both = plan_grad_s_and_b(dy, lora_B, S, adapter_dtype, precision, target)
        dS_result, dB_result = to_both.results

        def run(dy, lora_B, S, scaling):
            return grad_s_and_b(to_both, dy, lora_B, S, scaling=scaling)

        return run, (dS_result, dB_result)
    to_dS = None if lora_B is None else plan_shrink(dy, lora_B.t(), "", precision, target)
    to_dB = None if S is None else plan_grad_a(dy, S, adapter_dtype, precision, target, transposed=True)

    def run_apart(dy, lora_B, S, scaling):
        dS = shrink(to_dS, dy, lora_B, scaling=scaling) if to_dS else None
        return dS, grad_a(to_dB, dy, S, scaling=scaling)[0] if to_dB else None

    return run_apart, (to_dS.results[0] if to_dS else in_one_part, to_dB.results[0] if to_dB else in_one_part)


def _or_addmm(run: Run, plan: Callable[..., Run], *facts: Any) -> Run:
    """`run`, or for good the form "addmm" of the same step once a kernel of `run` asks for more than the GPU has.

    Triton says so at the first launch: a version of it may need more memory for a tile than the versions that were tried.
    """
    chosen = run

    def run_or_addmm(*args: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*args)
        except OutOfResources as error:
            if chosen is not run:
                raise
            warnings.warn(f'"fused" does not fit this GPU, "addmm" runs instead: {error}', RuntimeWarning, stacklevel=2)
            chosen = plan("addmm", *facts)
        return chosen(*args)

    return run_or_addmm


def parse_choice(choice: str, dtype: torch.dtype, precision: str, target: Target) -> tuple[bool, GemmConfig | None]:
    """(whether `choice` is the form "fused", the tile that it names or None).

    Raises:
        ValueError: `choice` names no form, or no tile that is valid for `dtype` on the target.
    """
    form, _, tile = choice.partition("/")
    if form not in FORMS or (tile and form != "fused"):
        raise ValueError(f'choice must be one of {FORMS} or "fused/<tile>", got {choice!r}')
    if not tile:
        return form == "fused", None
    tiles = {str(config): config for config in valid_tiles(dtype, precision, target, target.has_descriptors)}
    if tile not in tiles:
        raise ValueError(f"{tile!r} is no tile for {dtype} on this GPU, expected one of {', '.join(tiles)}")
    return True, tiles[tile]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _CURRENT_DEVICE
