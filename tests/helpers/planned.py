"""One launch at a time, planned for its operands and run, for the tests that look at a single kernel."""

from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import pack_bits, plan_pack_bits
from fastlora.kernels.gemm import gemm, plan_gemm
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.grad_b import grad_s_and_b, plan_grad_s_and_b
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.kernels.tensor_spec import TensorSpec


def run_shrink(x: Tensor, A: Tensor, target: Target = INTERPRETER, seed: Tensor | None = None, **options: Any) -> Tensor:
    """scaling · drop(x) Aᵀ."""
    plan = plan_shrink(TensorSpec.of(x), TensorSpec.of(A), seed is not None, matmul_precision(x.dtype), target)
    (S,) = sum_partials(plan_sum(*plan.results), shrink(plan, x, A, seed=seed, **options))
    return S


def run_grad_s_and_b(
    dy: Tensor, B: Tensor, S: Tensor, dtype: torch.dtype, target: Target = INTERPRETER, scaling: float = 1.0
) -> tuple[Tensor, ...]:
    """(dS, dB)."""
    precision = matmul_precision(dy.dtype)
    plan = plan_grad_s_and_b(TensorSpec.of(dy), TensorSpec.of(B), TensorSpec.of(S), dtype, precision, target)
    return sum_partials(plan_sum(*plan.results), *grad_s_and_b(plan, dy, B, S, scaling=scaling))


def run_grad_a(
    x: Tensor,
    U: Tensor,
    dtype: torch.dtype,
    target: Target = INTERPRETER,
    *,
    pack: bool = False,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """(Uᵀ drop(x), the packed mask with `pack`)."""
    facts = TensorSpec.of(x), TensorSpec.of(U), dtype, matmul_precision(x.dtype), target
    plan = plan_grad_a(*facts, dropout=seed is not None, pack=pack)
    partials, bits = grad_a(plan, x, U, seed=seed, dropout_p=dropout_p)
    (result,) = sum_partials(plan_sum(plan.results[0]), partials)
    return result, bits


def run_gemm(
    P: Tensor,
    Q: Tensor,
    U: Tensor,
    V: Tensor,
    target: Target = INTERPRETER,
    *,
    alpha: float = 1.0,
    bits: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """P Q + mask(alpha · U V)."""
    layouts = map(TensorSpec.of, (P, Q, U, V))
    facts = *layouts, P.dtype, matmul_precision(P.dtype), target
    return gemm(plan_gemm(*facts, masked=bits is not None, config=config), P, Q, U, V, alpha=alpha, bits=bits)


def run_pack_bits(seed: Tensor, rows: int, cols: int, p: float, **block: int) -> Tensor:
    """The packed mask."""
    return pack_bits(plan_pack_bits((rows, cols), **block), seed, p)
