"""What forward and backward launch, planned once for the layouts of their operands; with a plan its compiled kernel is kept."""

import functools

import torch

from fastlora import choices
from fastlora.kernels.dropout import plan_pack_bits
from fastlora.kernels.forms import Choice, Problem, next_power_of_2
from fastlora.kernels.gemm import plan_gemm
from fastlora.kernels.grad_a import plan_grad_a
from fastlora.kernels.grad_b import MAX_RANK, plan_grad_s_and_b
from fastlora.kernels.launch import Plan, Result
from fastlora.kernels.shrink import plan_shrink
from fastlora.kernels.sums import plan_sum
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec

Plans = tuple[str, dict[str, Plan]]  # the form, and the launches by what they compute


@functools.lru_cache(maxsize=4096)
def plan_forward(
    x: TensorSpec,
    weight: TensorSpec,
    lora_A: TensorSpec,
    lora_B: TensorSpec,
    bias: TensorSpec | None,
    dropout: bool,
    precision: str,
    choice: Choice | None,
    revision: int,
    target: Target,
) -> Plans:
    """`revision`, of the measured choices, is in the key only: with another one the choice may be another."""
    choice = choice or _choose("forward", x, weight, lora_A.shape[0], dropout, target)
    if choice.form == "torch":
        return choice.form, {}
    S = plan_shrink(x, lora_A, dropout, precision, target)
    U, V = TensorSpec.new(*S.results[0].shape, dtype=torch.float32), lora_B.t()
    P, Q = (x, weight.t()) if choice.form == "fused" else (None, None)
    y = plan_gemm(P, Q, U, V, x.dtype, precision, target, bias=bias, config=choice.config)
    return choice.form, {"S": S, "sum S": plan_sum(*S.results), "y": y}


@functools.lru_cache(maxsize=4096)
def plan_backward(
    dy: TensorSpec,
    x: TensorSpec | None,
    weight: TensorSpec | None,
    lora_A: TensorSpec | None,
    lora_B: TensorSpec | None,
    S: TensorSpec | None,
    dropout: bool,
    adapter_dtype: torch.dtype,
    precision: str,
    choice: Choice | None,
    revision: int,
    target: Target,
) -> Plans:
    """dS and dB come out of one pass over dy up to rank MAX_RANK, above it each out of its own; dx's rank-r term, where it is
    prefilled, out of dA's pass over x, where there is one."""
    form, config = "addmm", None
    if weight is not None and lora_A is not None:
        choice = choice or _choose("backward", dy, weight, lora_A.shape[0], dropout, target)
        form, config = choice.form, choice.config
    plans: dict[str, Plan] = {}
    if form == "torch":
        return form, plans
    dS = dA = dB = Result((), adapter_dtype)  # nothing to be summed
    if lora_B is not None and S is not None and S.shape[1] <= MAX_RANK:
        plans["dS dB"] = plan_grad_s_and_b(dy, lora_B, S, adapter_dtype, precision, target)
        dS, dB = plans["dS dB"].results
    elif lora_B is not None:
        plans["dS"] = plan_shrink(dy, lora_B.t(), False, precision, target)
        dS = plans["dS"].results[0]
    if S is not None and "dS dB" not in plans:
        plans["dB"] = plan_grad_a(dy, S, adapter_dtype, precision, target, transposed=True)
        dB = plans["dB"].results[0]
    if lora_B is not None:
        U = TensorSpec.new(dy.shape[0], lora_B.shape[1], dtype=torch.float32)
        fused = form == "fused"
        if x is not None:
            V = None if fused or weight is None else lora_A
            pack = fused and dropout
            plans["dA"] = plan_grad_a(x, U, adapter_dtype, precision, target, dropout=dropout, pack=pack, V=V)
            dA = plans["dA"].results[0]
        if weight is not None and lora_A is not None:
            if x is None and dropout:
                plans["bits"] = plan_pack_bits((dy.shape[0], weight.shape[1]))
            if fused or x is None:
                P, Q = (dy, weight) if fused else (None, None)
                plans["dx"] = plan_gemm(P, Q, U, lora_A, dy.dtype, precision, target, masked=dropout, config=config)
    return form, plans | {"sum dS": plan_sum(dS), "sum dA dB": plan_sum(dA, dB)}


def _choose(direction: str, rows: TensorSpec, weight: TensorSpec, r: int, dropout: bool, target: Target) -> Choice:
    out_features, in_features = weight.shape
    return choices.choose(
        Problem(direction, rows.dtype, next_power_of_2(rows.shape[0]), in_features, out_features, r, dropout), target
    )
