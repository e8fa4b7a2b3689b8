"""The three operators of DoRA, on those of the LoRA linear.  `fastlora.variants.dora` has their mathematics."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastlora import ops, torch_backend
from fastlora.dropout import keep_scale
from fastlora.rows import accumulator, as_rows, chunks, keep_bits, masked, without_autocast

_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
_LIBRARY.define("dora_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor")
_LIBRARY.define(
    "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor factor, Tensor? seed, "
    "float scaling, float dropout_p, str backend, bool keep_z) -> (Tensor y, Tensor S, Tensor mask, Tensor z)"
)
_LIBRARY.define(
    "dora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor factor, Tensor? S, "
    "Tensor? mask, Tensor? z, float scaling, float dropout_p, ScalarType adapter_dtype, str backend) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dfactor)"
)


@without_autocast
def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n = ‖W + scaling · B A‖ of each row, (out,), in float32 or float64: the operator dora_norm."""
    dtype = accumulator(weight.dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    cross = torch_backend.shrink(weight, lora_A, (None,), 0.0)
    inner = torch.addmm(cross, B, A @ A.t(), beta=2 * scaling, alpha=scaling**2)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    return (squares + (B * inner).sum(1)).clamp_(min=0).sqrt_()


def scaled(total: Tensor, magnitude: Tensor | None, dim: int) -> Tensor:
    """W + scaling · B A, `total`, with the magnitude (out,) as the length of each row, which runs along `dim`.

    Without a magnitude it is `total` itself.
    """
    if magnitude is None:
        return total
    n = torch.linalg.vector_norm(total, dim=dim, keepdim=True)
    return total * (magnitude.detach().to(n.dtype).unsqueeze(dim) / n)


@without_autocast
def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y (..., out), S (M, r), mask, z (M, out) or empty): the operator dora_linear.  With dropout z is z / c."""
    if seed is None:
        u, S, mask = ops.forward(x, weight, lora_A, lora_B, None, None, scaling, dropout_p, backend)
        y = torch.empty_like(u) if keep_z else u
        z, out = as_rows(u), as_rows(y)
        shift = factor.new_zeros(()) if bias is None else bias
        for rows in chunks(z):
            torch.addcmul(shift, z[rows], factor, out=out[rows])
        return y, S, mask, z if keep_z else x.new_empty(0)
    y, S, mask = ops.forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend)
    c, out = keep_scale(dropout_p), as_rows(y)
    bits = _bits(mask if ops.keeps_mask(seed, backend) else seed, x.shape, dropout_p, backend)
    z = _dropped_product(as_rows(x), weight, lora_A.dtype, bits)
    z.addmm_(S.to(z.dtype), lora_B.t(), alpha=scaling / c if c else 0.0)
    gain = (factor - 1) * c
    for rows in chunks(z):
        out[rows].addcmul_(z[rows], gain)
    return y, S, mask, z if keep_z else x.new_empty(0)


@without_autocast
def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    factor: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx (..., in), dA (r, in), dB (out, r), dfactor (out,)): the operator dora_linear_backward."""
    dx, dA, dB, dfactor = (dy.new_empty(0) for _ in range(4))  # outputs of an operator may not share memory
    c, column = keep_scale(dropout_p), factor.unsqueeze(1)
    if lora_B is not None or S is not None:
        B = None if lora_B is None else (lora_B * column).to(lora_B.dtype)
        W = weight if weight is None or mask is not None else (weight * column).to(weight.dtype)
        dx, dA, dB = ops.backward(dy, x, W, lora_A, B, S, mask, scaling, dropout_p, adapter_dtype, backend)
    if weight is not None and mask is not None:
        term = as_rows(dy) @ (weight * (c * (column - 1))).to(weight.dtype)
        bits = _bits(mask, dx.shape, dropout_p, backend)
        out = as_rows(dx)
        for rows in chunks(term):
            out[rows].add_(_dropped(term[rows], bits, rows))
    if S is not None:
        dB = (dB * column).to(adapter_dtype)
    if z is not None:
        dfactor, dy_rows = torch.zeros_like(factor), as_rows(dy)
        for rows in chunks(z):
            dfactor += (dy_rows[rows].to(factor.dtype) * z[rows]).sum(0)
        dfactor *= c
    return dx, dA, dB, dfactor


def _bits(mask: Tensor, shape: torch.Size, dropout_p: float, backend: str) -> Tensor:
    """The packed mask of an activation of `shape`: `mask` itself on the backend "torch", else from the seed in its place."""
    if backend == "torch":
        return mask
    from fastlora.kernels.dropout import mask_code, pack_bits  # it imports Triton, as in fastlora.ops
    from fastlora.kernels.steps import on_device
    from fastlora.kernels.target import target_of

    with on_device(mask.device):
        plan = _plan_bits(math.prod(shape[:-1]), shape[-1], mask_code(dropout_p, mask, target_of(mask.device)))
        return pack_bits(plan, mask, dropout_p)


@functools.lru_cache(maxsize=4096)
def _plan_bits(rows: int, cols: int, code: str) -> Any:
    from fastlora.kernels.dropout import plan_pack_bits

    return plan_pack_bits((rows, cols), code)


def _dropped(part: Tensor, bits: Tensor, rows: slice) -> Tensor:
    """mask(part) in float32 or float64, where part holds `rows` of an activation."""
    keep = keep_bits(bits, rows, part.shape[1], accumulator(part.dtype))
    return masked(part.to(accumulator(part.dtype)), keep, out=keep)


def _dropped_product(x: Tensor, weight: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """mask(x) Wᵀ, (M, out), in `dtype`: that of x, or a wider one, in which a GPU sums 16-bit operands as they are."""
    widened = x.dtype != dtype and not x.is_cuda
    kept = torch.empty(x.shape, dtype=dtype if widened else x.dtype, device=x.device)
    for rows in chunks(x):
        kept[rows].copy_(_dropped(x[rows], bits, rows))
    W_t = weight.to(kept.dtype).t()
    return kept @ W_t if kept.dtype == dtype else torch.mm(kept, W_t, out_dtype=dtype)


@torch.library.register_fake("fastlora::dora_norm", lib=_LIBRARY)
def _norm_fake(weight, lora_A, lora_B, scaling):  # type: ignore[no-untyped-def]  # the schema types it
    return weight.new_empty(weight.shape[0], dtype=accumulator(weight.dtype))


@torch.library.register_fake("fastlora::dora_linear", lib=_LIBRARY)
def _forward_fake(x, weight, lora_A, lora_B, bias, factor, seed, scaling, dropout_p, backend, keep_z):  # type: ignore[no-untyped-def]  # the schema types it
    y, S, mask = ops._forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend)
    dtype = x.dtype if seed is None else lora_A.dtype
    return y, S, mask, x.new_empty((S.shape[0], y.shape[-1]), dtype=dtype) if keep_z else x.new_empty(0)


@torch.library.register_fake("fastlora::dora_linear_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight, lora_A, lora_B, factor, S, mask, z, scaling, dropout_p, adapter_dtype, backend):  # type: ignore[no-untyped-def]  # the schema types it
    found = ops._backward_fake(dy, x, weight, lora_A, lora_B, S, mask, scaling, dropout_p, adapter_dtype, backend)
    return *found, dy.new_empty(0) if z is None else torch.empty_like(factor)


for _name, _run in (("dora_norm", norm), ("dora_linear", forward), ("dora_linear_backward", backward)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")

DORA_NORM = torch.ops.fastlora.dora_norm.default
DORA_LINEAR = torch.ops.fastlora.dora_linear.default
DORA_LINEAR_BACKWARD = torch.ops.fastlora.dora_linear_backward.default
