"""The steps of several adapters on one weight: U holds the S of all, side by side, and B theirs.

shrink.py   Sᵢ = dropᵢ(x) Aᵢᵀ                  one pass over x for adapters of one rate
gemm.py     y = x Wᵀ + bias + U Bᵀ             as for one linear, of the rank of all
grad_b.py   dU = dy B, dB = dyᵀ U              one pass over dy, up to rank MAX_RANK
grad_a.py   dAᵢ = dSᵢᵀ dropᵢ(x), dx = Σ c · maskᵢ(dSᵢ Aᵢ)     one pass over x, as the first
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fastlora.kernels import group
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code
from fastlora.kernels.grad_a import grad_a
from fastlora.kernels.shrink import shrink
from fastlora.kernels.steps import Run, on_device
from fastlora.kernels.sums import sum_partials
from fastlora.kernels.target import target_of
from fastlora.kernels.tensor_spec import TensorSpec


def shrink_parts(x: Tensor, lora_A: Tensor, seed: Tensor | None, words: tuple[int, ...], dropout_p: float) -> Tensor:
    """S (n, M, r) float32 of x (M, in) and A (n · r, in), without dropout where seed is None."""
    with on_device(x.device):
        target = target_of(x.device)
        facts = target, matmul_precision(x.dtype), mask_code(dropout_p, seed, target), words
        to_S, sum_S = group._plan_s(*facts, *TensorSpec.of_each(x, lora_A))
        (S,) = sum_partials(sum_S, shrink(to_S, x, lora_A, seed=seed, dropout_p=dropout_p))
        return S.view(len(words), x.shape[0], -1)


def expand(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    out: Tensor,
    choice: str,
    plan: Callable[..., Run],
) -> Tensor:
    """y = x Wᵀ + bias + U Bᵀ in `out`, in the form `choice` that `plan` resolves."""
    with on_device(x.device):
        specs = TensorSpec.of_each(x, weight, lora_B, bias)
        return plan(choice, target_of(x.device), matmul_precision(x.dtype), "", *specs)(x, weight, lora_B, bias, U, 1.0, out)


def grad_u_and_b(dy: Tensor, lora_B: Tensor, U: Tensor) -> Sequence[Tensor]:
    """(dU (M, R) float32, dB (out, R) in B's dtype)."""
    with on_device(dy.device):
        facts = target_of(dy.device), matmul_precision(dy.dtype), lora_B.dtype
        run, sums = group._plan_dS_dB(*facts, *TensorSpec.of_each(dy, lora_B, U))
        return sum_partials(sums, *run(dy, lora_B, U, 1.0))


def grad_a_parts(
    x: Tensor,
    dS: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    words: tuple[int, ...],
    dropout_p: float,
    dx: Tensor | None,
    add: bool,
) -> Tensor:
    """dA (n · r, in) in A's dtype for dS (n, M, r); dx (M, in) gets the LoRA terms, added with `add` to what is there."""
    with on_device(x.device):
        target, V, U = target_of(x.device), None if dx is None else lora_A, dS.reshape(-1, dS.shape[-1])
        facts = target, matmul_precision(x.dtype), mask_code(dropout_p, seed, target), words, lora_A.dtype, add
        to_dA, sum_dA = group._plan_a(*facts, *TensorSpec.of_each(x, U, V))
        dA, _ = grad_a(to_dA, x, U, V, seed=seed, dropout_p=dropout_p, dx=dx)
        (dA,) = sum_partials(sum_dA, dA)
        return dA.view(lora_A.shape)
