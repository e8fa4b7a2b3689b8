"""The sum of partial results in a fixed order, so that split reductions are bit-equal in every run."""

import math
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import launch
from fastlora.kernels.config import cdiv
from fastlora.kernels.dot import round_to
from fastlora.kernels.launch import Plan, Result

BLOCK = 512  # elements of a program: each thread adds up 16 bytes of every partial sum
AT_ONCE = tl.constexpr(8)  # loads in flight: one at a time, each addition waits for memory

Computed = TypeVar("Computed", Tensor, Tensor | None)


@triton.jit
def _sum_block(partials, out, size, splits, block, BLOCK: tl.constexpr):
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        parts = first + tl.arange(0, AT_ONCE)
        pointers = partials + parts[:, None].to(tl.int64) * size + index[None, :]
        total += tl.sum(tl.load(pointers, mask=(parts[:, None] < splits) & (index[None, :] < size), other=0.0), axis=0)
    tl.store(out + index, round_to(total, out.dtype.element_ty), mask=index < size)


@triton.jit(do_not_specialize=["splits", "other_splits", "blocks"])
def sum_partials_kernel(
    partials,
    out,
    other_partials,
    other_out,
    size,
    splits,
    other_size,
    other_splits,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """out[i] = Σ_s partials[s, i], AT_ONCE at a time.  With COUNT = 2 the programs from `blocks` on compute other_out."""
    block = tl.program_id(0)
    if COUNT == 2:
        if block < blocks:
            _sum_block(partials, out, size, splits, block, BLOCK)
        else:
            _sum_block(other_partials, other_out, other_size, other_splits, block - blocks, BLOCK)
    else:
        _sum_block(partials, out, size, splits, block, BLOCK)


def plan_sum(*results: Result) -> Plan:
    """One launch that sums those of `results`, at most two, that come in parts."""
    sizes, blocks = [], []
    for result in results:
        if result.parts > 1:
            sizes += [math.prod(result.shape), result.parts]
            blocks.append(cdiv(sizes[-2], BLOCK))
    options = {"BLOCK": BLOCK, "COUNT": len(blocks), "num_warps": 4, "num_stages": 1}
    return Plan(sum_partials_kernel, (sum(blocks),), (*sizes, *[0] * (4 - len(sizes)), *blocks[:1]), options, results)


def sum_partials(plan: Plan, *computed: Computed) -> tuple[Computed, ...]:
    """The plan's results from what the kernels computed: (parts, ...) float32 is summed, a whole result returned as it is."""
    if plan.options["COUNT"] == 0:
        return computed
    sums, operands = list(computed), []
    for index, (result, partials) in enumerate(zip(plan.results, computed, strict=True)):
        if result.parts > 1 and partials is not None:
            sums[index] = torch.empty(result.shape, dtype=result.dtype, device=partials.device)
            operands += [partials, sums[index]]
    launch.launch(plan, *operands, *[None] * (4 - len(operands)), *plan.sizes)
    return tuple(sums)
