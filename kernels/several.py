"""The steps of several adapters on one weight: U holds the S of all, side by side, and B theirs.

shrink.py   Sᵢ = dropᵢ(x) Aᵢᵀ                  one pass over x for adapters of one rate
gemm.py     y = x Wᵀ + bias + U Bᵀ             as for one linear, of the rank of all
grad_b.py   dU = dy B, dB = dyᵀ U              one pass over dy, up to rank MAX_RANK
grad_a.py   dAᵢ = dSᵢᵀ dropᵢ(x), dx = Σ c · maskᵢ(dSᵢ Aᵢ)     as for projections that share x
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fastlora.kernels import group
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.steps import Run, on_device
from fastlora.kernels.sums import sum_partials
from fastlora.kernels.target import target_of
from fastlora.kernels.tensor_spec import TensorSpec


def shrink_parts(x: Tensor, lora_A: Tensor, seed: Tensor | None, words: tuple[int, ...], dropout_p: float) -> Tensor:
    """S (n, M, r) float32 of x (M, in) and A (n · r, in), without dropout where seed is None."""
    with on_device(x.device):
        return group.shrink_shared(x, lora_A, seed, words, dropout_p, target_of(x.device))


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
    dSs: Sequence[Tensor],
    lora_A: Tensor,
    seed: Tensor | None,
    words: tuple[int, ...],
    dropout_p: float,
    dx: Tensor | None,
    add: bool,
) -> Tensor:
    """dA (n · r, in) in A's dtype for n dS (M, r); dx (M, in) gets the LoRA terms, added with `add`."""
    with on_device(x.device):
        return group.grad_a_shared(x, dSs, lora_A, seed, words, dropout_p, dx, add, target_of(x.device))
