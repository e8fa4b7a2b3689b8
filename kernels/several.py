"""The steps of several adapters on one weight: U holds the S of all, side by side, and B theirs.

group.py    Sᵢ = dropᵢ(x) Aᵢᵀ                  as for projections that share x
gemm.py     y = x Wᵀ + bias + U Bᵀ             as for one linear, of the rank of all
grad_b.py   dU = dy B, dB = dyᵀ U              one pass over dy, up to rank MAX_RANK
group.py    dAᵢ = dSᵢᵀ dropᵢ(x), dx = Σ c · maskᵢ(dSᵢ Aᵢ)     as for projections that share x
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fastlora.kernels import group
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.steps import Run, on_device
from fastlora.kernels.sums import sum_partials
from fastlora.kernels.target import target_of
from fastlora.kernels.tensor_spec import TensorSpec


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
