"""The forms a step can take, and which one is taken where none was measured.

    fused     one Triton GEMM that starts from the rank-r term
    prefill   a kernel writes the rank-r term, then the vendor's GEMM accumulates onto it in place
    torch     matrix products of torch alone, where there is no mask: few launches, for decoding

Against the frozen GEMM with a reduction of length L, the fused form pays r / L for its rank-r term and whatever Triton's GEMM
is slower than the vendor's; the prefill form pays BALANCE / L for writing the term (the vendor's GEMM reads it back in its
epilogue).  So fused wins while Triton's GEMM is within (BALANCE − r) / L of the vendor's.
"""

from dataclasses import dataclass

import torch

from fastlora.kernels.config import GemmConfig, cdiv
from fastlora.kernels.target import Target
from fastlora.torch_backend import DECODE_ROWS

FORMS = ("fused", "addmm", "torch")
#: Multiply-adds of 16-bit operands in the time that memory takes for an element of 2 bytes: 790 TFLOP/s over 4.3 TB/s, what is
#: assumed of an H200.
BALANCE = 184
#: By how much Triton's GEMM is taken to be slower than the vendor's until `fastlora tune` has measured it: the middle of what
#: is published for Hopper, 0.85 to 0.98 of cuBLAS, and a little for the rank-r term, whose loads nothing hides.
ASSUMED_SLOWDOWN = 0.1


@dataclass(frozen=True)
class Problem:
    """What the choice of a form depends on besides the GPU.  rows: a power of two, see `next_power_of_2`."""

    direction: str  # "forward" or "backward"
    dtype: torch.dtype  # of x, W and dy
    rows: int
    in_features: int
    out_features: int
    r: int
    dropout: bool

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that can solve it: torch's own products have no mask."""
        return FORMS[:2] if self.dropout else FORMS


@dataclass(frozen=True)
class Choice:
    """The form of a step and, for the fused one, its tile; None is the tile that `gemm_config` chooses."""

    form: str
    config: GemmConfig | None = None


def next_power_of_2(rows: int) -> int:
    """The power of two that `rows` is counted as: the next one up."""
    return 1 << max(rows - 1, 0).bit_length()


def default_choice(problem: Problem, target: Target) -> Choice:
    """The choice by arithmetic."""
    forward = problem.direction == "forward"
    if forward and not problem.dropout and problem.rows <= DECODE_ROWS:
        return Choice("torch")
    length, width = (problem.in_features, problem.out_features)[:: 1 if forward else -1]
    # float32 without tensor cores, and tiles too few for the chip, are where the vendor's GEMM is furthest ahead.
    fills_chip = cdiv(problem.rows, 128) * cdiv(width, 256) >= target.sms
    within_reach = length * ASSUMED_SLOWDOWN <= BALANCE - problem.r
    return Choice("fused" if problem.dtype.itemsize == 2 and fills_chip and within_reach else "addmm")
