"""The middle and the last linear of a gated MLP on plain torch ops: what kernels/mlp_steps.py does on Triton kernels.

With e = gate(x), g = up(x) and the packed mask of down's projection:

    forward    h = act(e) · g,  S = c · mask(h) Aᵀ,  y = h Wᵀ + bias + scaling · S Bᵀ
    backward   dh = dy W + c · mask(dS A),  dg = dh · act(e),  de = dh · g · act'(e),  dA = c · dSᵀ mask(h)

Backward goes over the rows in chunks; dg is written over dh, and h exists a chunk at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import torch_backend
from fastlora.rows import accumulator, chunks, keep_bits, masked
from fastlora.torch_backend import grad_s_and_b

_GELU_BACKWARD = torch.ops.aten.gelu_backward
#: name -> (act(e), dact · act'(e))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, _GELU_BACKWARD),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), partial(_GELU_BACKWARD, approximate="tanh")),
}


def forward(
    e: Tensor,
    g: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    activation: str,
    out: Tensor,
) -> Tensor:
    """S (M, r) of e and g (M, K); y (M, out) goes to `out`.  lora_A and lora_B are None where down has no adapter."""
    act, _ = ACTIVATIONS[activation]
    h = torch.empty_like(e)
    for rows in chunks(e):
        h[rows].copy_(act(e[rows].to(accumulator(e.dtype))).mul_(g[rows]))
    if lora_A is None or lora_B is None:
        torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)
        return h.new_empty((h.shape[0], 0), dtype=accumulator(h.dtype))
    return torch_backend.forward(h, weight, lora_A, lora_B, bias, mask, scaling, dropout_p, out)[1]


def backward(
    dy: Tensor,
    e: Tensor,
    g: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    S: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(de, dg, dA, dB) of dy (M, out); dA and dB are None where there is no adapter."""
    act, act_backward = ACTIVATIONS[activation]
    dtype = accumulator(dy.dtype)
    dS, dB, A, dA = None, None, None, None
    if lora_A is not None:
        dS, dB = grad_s_and_b(dy, lora_B, S, scaling, dropout_p)  # dS holds the dropout scale
        A, dA = lora_A.to(dtype), dy.new_zeros(lora_A.shape, dtype=dtype)
    dg, de = dy @ weight, torch.empty_like(e)
    for rows in chunks(e):
        e_rows, g_rows, dh = (t[rows].to(dtype) for t in (e, g, dg))
        h_act = act(e_rows)
        if dS is not None and A is not None and dA is not None:
            term, keep = dS[rows] @ A, keep_bits(mask, rows, e.shape[1], dtype)
            dh = dh + masked(term, keep, out=term)
            h = (h_act * g_rows).to(e.dtype).to(dtype)  # rounded as in forward
            dA.addmm_(dS[rows].t(), masked(h, keep, out=keep))
        de[rows].copy_(act_backward(dh * g_rows, e_rows))
        dg[rows].copy_(h_act.mul_(dh))
    if lora_A is None or dA is None or dB is None:
        return de, dg, None, None
    return de, dg, dA.to(lora_A.dtype), dB.to(lora_A.dtype)
