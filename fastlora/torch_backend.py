"""The same steps as the kernels on plain torch ops: for CPU users, and as the second implementation to test against.

Forward:   S = c · mask(x) Aᵀ,  y = x Wᵀ + bias + scaling · S Bᵀ
Backward:  dS = scaling · dy B,  dB = scaling · dyᵀ S,  dA = c · dSᵀ mask(x),  dx = dy W + c · mask(dS A)

with c = keep_scale(p).  Where the kernels take a seed, these functions take the packed mask, one bit an element of x: on a CPU
it takes ten times as long to make the bits as to look them up, so forward and backward share them.  A dropped copy of x never
exists whole.  The second of two terms is accumulated in place onto the first.  Sums are kept in float32 (float64 for float64
inputs), also where x is 16-bit.

Projections that share x share its passes: their A stand below each other, one mask applies to all of them or one to each.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastlora.dropout import keep_scale
from fastlora.rows import accumulator, chunks, keep_bits, masked, without_autocast

#: Up to so many rows a forward without dropout waits for launches and for W, and nothing of it is worth a kernel of its own.
DECODE_ROWS = 64

#: On a CPU, PEFT's forward and backward take less time below so many elements of x, where the host's time decides: ours is 0.99
#: to 1.07 of theirs at 2**17 elements, 0.91 to 0.99 at 2**18, with dropout and without (one thread, widths 256 to 1024).
BREAK_EVEN = 3 << 16

Masks: TypeAlias = Sequence[Tensor | None]  # packed; all None where there is no dropout


@without_autocast
def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, S) of 2-D x (M, in), y in `out` where given.  S (M, r) holds the dropout scale but not `scaling`.

    mask: `dropout.packed_mask`, None for no dropout.
    """
    S = shrink(x, lora_A, (mask,), dropout_p)
    return expand(x, weight, S, lora_B, bias, scaling, out), S


@without_autocast
def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB).  dx, in `out` where given, needs weight, lora_A and lora_B; dA needs x and lora_B; dB needs S."""
    dS, dB = grad_s_and_b(dy, lora_B, S, scaling, dropout_p)
    if dB is not None:
        dB = dB.to(adapter_dtype)
    if dS is None:
        return None, None, dB
    dx = dy.new_empty((dy.shape[0], weight.shape[1])) if out is None and weight is not None else out
    dA = grad_a_and_term_of_dx(dS, x, lora_A, dx, (mask,))
    if dx is not None and weight is not None:
        dx.addmm_(dy, weight)
    return dx, dA if dA is None else dA.to(adapter_dtype), dB


@without_autocast
def forward_shared(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Tensor,
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Masks,
    scalings: Sequence[float],
    dropout_p: float,
    outs: Sequence[Tensor],
) -> Tensor:
    """S (n, M, r) of n projections of one rank r, their y in `outs`.  lora_A is (n · r, in), masks are one or n."""
    S = shrink(x, lora_A, masks, dropout_p)
    S = S.view(len(S), len(outs), lora_A.shape[0] // len(outs)).transpose(0, 1).contiguous()
    for weight, part, lora_B, bias, scaling, out in zip(weights, S, lora_Bs, biases, scalings, outs, strict=True):
        expand(x, weight, part, lora_B, bias, scaling, out)
    return S


@without_autocast
def backward_shared(
    x: Tensor,
    dys: Sequence[Tensor],
    lora_A: Tensor,
    lora_Bs: Sequence[Tensor],
    Ss: Sequence[Tensor],
    masks: Masks,
    scalings: Sequence[float],
    dropout_p: float,
    dx: Tensor | None,
    add: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(dA (n · r, in), each dB (out, r)) of n projections, in the adapters' dtype.

    dx (M, in) gets the sum of their LoRA terms, added with `add` to what is there.  W is not multiplied.
    """
    operands = zip(dys, lora_Bs, Ss, scalings, strict=True)
    products = [grad_s_and_b(dy, lora_B, S, scaling, dropout_p) for dy, lora_B, S, scaling in operands]
    dS = torch.cat([dS for dS, _ in products if dS is not None], 1)
    dA = grad_a_and_term_of_dx(dS, x, lora_A, dx, masks, add)
    assert dA is not None
    return dA.to(lora_A.dtype), [dB.to(lora_A.dtype) for _, dB in products if dB is not None]


def expand(
    x: Tensor, weight: Tensor, S: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, out: Tensor | None
) -> Tensor:
    """y = x Wᵀ + bias + scaling · S Bᵀ."""
    y = torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    add_rank_term(y, S, lora_B, scaling)
    return y


@without_autocast
def add_rank_term(y: Tensor, S: Tensor, lora_B: Tensor, scaling: float) -> None:
    """y += scaling · S Bᵀ in place; with B in a wider dtype than y's, summed in B's."""
    if lora_B.dtype == y.dtype:
        y.addmm_(S.to(y.dtype), lora_B.t(), alpha=scaling)
        return
    B_t = lora_B.t() * scaling
    for rows in chunks(y):
        y[rows].add_(S[rows] @ B_t)


def shrink(x: Tensor, lora_A: Tensor, masks: Masks, dropout_p: float) -> Tensor:
    """S = c · mask(x) Aᵀ, (M, r).  Of n masks each goes with r / n rows of A."""
    dtype = accumulator(x.dtype)
    if masks[0] is None and x.dtype == lora_A.dtype == dtype:
        return x @ lora_A.t()
    if masks[0] is None and x.dtype == lora_A.dtype and x.is_cuda:
        return torch.mm(x, lora_A.t(), out_dtype=dtype)  # the sum as it was kept; on a CPU it comes out rounded only
    As, c = lora_A.to(dtype).chunk(len(masks)), keep_scale(dropout_p)
    S = x.new_empty((x.shape[0], lora_A.shape[0]), dtype=dtype)
    for rows in chunks(x):
        x_rows = x[rows].to(dtype)
        for mask, A, part in zip(masks, As, S[rows].chunk(len(masks), 1), strict=True):
            keep = keep_bits(mask, rows, x.shape[1], dtype)
            _product(masked(x_rows, keep, out=keep), A.t(), c, out=part)
    return S


@without_autocast
def grad_s_and_b(
    dy: Tensor, lora_B: Tensor | None, S: Tensor | None, scaling: float, dropout_p: float
) -> tuple[Tensor | None, Tensor | None]:
    """c · dS = c · scaling · dy B where B is given, dB = scaling · dyᵀ S where S is, in one pass over dy."""
    dtype = accumulator(dy.dtype)
    B = None if lora_B is None else lora_B.to(dtype)
    dS = None if B is None else dy.new_empty((dy.shape[0], B.shape[1]), dtype=dtype)
    dB_t = None if S is None else dy.new_zeros((S.shape[1], dy.shape[1]), dtype=dtype)  # half the time of dB itself
    for rows in chunks(dy) if dy.dtype != dtype else [slice(None)]:
        dy_rows = dy[rows].to(dtype)
        if B is not None and dS is not None:
            _product(dy_rows, B, scaling * keep_scale(dropout_p), out=dS[rows])
        if S is not None and dB_t is not None:
            dB_t.addmm_(S[rows].t(), dy_rows, alpha=scaling)
    return dS, None if dB_t is None else dB_t.t().contiguous()


def grad_a_and_term_of_dx(
    dS: Tensor, x: Tensor | None, lora_A: Tensor | None, dx: Tensor | None, masks: Masks, add: bool = False
) -> Tensor | None:
    """dA = dSᵀ mask(x) where x is given, and dx = mask(dS A) where dx is, or added to it; dS holds the dropout scale.

    Of n masks each goes with r / n columns of dS and rows of A, and dx gets the sum.
    """
    n = len(masks)
    if masks[0] is None and dx is not None and lora_A is not None and lora_A.dtype == dx.dtype:
        torch.addmm(dx, dS.to(dx.dtype), lora_A, beta=int(add), out=dx)
        dx = None
    source = x if x is not None else dx
    if source is None:
        return None
    As = [None] * n if lora_A is None else lora_A.to(dS.dtype).chunk(n)
    dA = None if x is None else dS.new_zeros((dS.shape[1], x.shape[1]))
    grads = [None] * n if dA is None else dA.chunk(n)
    for rows in chunks(source) if masks[0] is not None or source.dtype != dS.dtype else [slice(None)]:
        x_rows = None if x is None else x[rows].to(dS.dtype)
        total = None
        for mask, A, part, grad in zip(masks, As, dS[rows].chunk(n, 1), grads, strict=True):
            keep = keep_bits(mask, rows, source.shape[1], dS.dtype)
            if dx is not None and A is not None:
                term = part @ A
                term = masked(term, keep, out=term)
                total = term if total is None else total.add_(term)
            if x_rows is not None and grad is not None:
                grad.addmm_(part.t(), masked(x_rows, keep, out=keep))
        if dx is not None and total is not None:
            dx[rows].add_(total) if add else dx[rows].copy_(total)
    return dA


def _product(first: Tensor, second: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · first second, without a pass for the factor."""
    torch.addmm(out, first, second, beta=0, alpha=factor, out=out)
