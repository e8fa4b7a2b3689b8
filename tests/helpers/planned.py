"""Single launches, planned for their operands and run, and the operands that the tests of each kernel share."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import oracle
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code, pack_bits, plan_pack_bits
from fastlora.kernels.gemm import gemm, plan_gemm
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.grad_b import grad_s_and_b, plan_grad_s_and_b
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.kernels.tensor_spec import TensorSpec

DTYPES = oracle.DTYPES  # (dtype of x, dtype of the adapter)

#: Views of a (rows, cols) matrix with the same shape and values, each unlike a freshly allocated one.
VIEWS = {
    "contiguous": lambda t: t,
    "every other row": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    "every other column": lambda t: torch.stack((t, t), 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) if t.numel() else t,
    "within a wider row": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
}


class Operands(NamedTuple):
    """x (M, K), A (r, K) and a contiguous float32 U (M, r) for one launch on `target`."""

    shape: tuple[int, int, int]  # (M, K, r)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    view: str = "contiguous"
    target: Target = INTERPRETER

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x, A, U): standard normal."""
        M, K, r = self.shape
        x, A = (VIEWS[self.view](torch.randn(rows, K).to(dtype)) for rows, dtype in zip((M, r), self.dtypes, strict=True))
        return x, A, torch.randn(M, r)


MANY = replace(INTERPRETER, sms=64)  # has more multiprocessors than these launches have work: every reduction is split
AMPERE = Target(80, 4, 166912)
SHAPES = [(1, 1, 1), (3, 700, 2), (150, 40, 32), (0, 8, 3), (8, 0, 3)]  # tiny, few rows, several tiles, empty
OPERANDS = [Operands((37, 131, 5), dtypes, view) for dtypes in DTYPES for view in VIEWS]
OPERANDS += [Operands((135, 264, 16), dtypes, target=target) for dtypes in DTYPES for target in (MANY, AMPERE)]
OPERANDS += [Operands(shape, target=target) for shape in SHAPES for target in (INTERPRETER, MANY)]


def assert_close(result: Tensor, expected: Tensor, base: torch.dtype) -> None:
    """`result` is within the oracle's floor for operands in `base`; twice the floor in 16 bits, where U is rounded as well."""
    error = oracle.relative_error(result, expected)
    assert error <= oracle.FLOOR[base, result.dtype] * (1 if result.dtype == torch.float32 else 2)


def far_apart(rows: int, cols: int, stride: int) -> Tensor:
    """A random float16 (rows, cols) whose rows lie `stride` elements apart; memory between them is never touched."""
    storage = torch.empty((rows - 1) * stride + cols, dtype=torch.float16)
    return storage.as_strided((rows, cols), (stride, 1)).copy_(torch.randn(rows, cols))


def run_shrink(x: Tensor, A: Tensor, target: Target = INTERPRETER, seed: Tensor | None = None, **options: Any) -> Tensor:
    """scaling · drop(x) Aᵀ."""
    mask = mask_code(options.get("dropout_p", 0.0), seed, target)
    plan = plan_shrink(TensorSpec.of(x), TensorSpec.of(A), mask, matmul_precision(x.dtype), target)
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
    V: Tensor | None = None,
    transposed: bool = False,
    pack: bool = False,
    seed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """(scaling · Uᵀ drop(x), the packed mask with `pack`, drop(U V) with V)."""
    small = None if V is None else TensorSpec.of(V)
    facts = TensorSpec.of(x), TensorSpec.of(U), dtype, matmul_precision(x.dtype), target
    plan = plan_grad_a(
        *facts, transposed=transposed, mask=mask_code(options.get("dropout_p", 0.0), seed, target), pack=pack, V=small
    )
    dx = None if V is None else x.new_full(x.shape, torch.nan)
    partials, bits = grad_a(plan, x, U, V, seed=seed, dx=dx, **options)
    (result,) = sum_partials(plan_sum(plan.results[0]), partials)
    return result, bits if V is None else dx


def run_gemm(
    P: Tensor | None,
    Q: Tensor | None,
    U: Tensor,
    V: Tensor,
    target: Target = INTERPRETER,
    *,
    config: Any = None,
    **options: Any,
) -> Tensor:
    """P Q + bias + mask(alpha · U V), in V's dtype where P is None."""
    specs = TensorSpec.of_each(P, Q, U, V, options.get("bias"))
    dtype = V.dtype if P is None else P.dtype
    facts: Any = *specs[:4], dtype, matmul_precision(dtype), target
    plan = plan_gemm(*facts, bias=specs[4], masked=options.get("bits") is not None, config=config)
    return gemm(plan, P, Q, U, V, **{"alpha": 1.0} | options)


def run_pack_bits(seed: Tensor, rows: int, cols: int, p: float, **block: int) -> Tensor:
    """The packed mask."""
    return pack_bits(plan_pack_bits((rows, cols), mask_code(p, seed, INTERPRETER), **block), seed, p)
