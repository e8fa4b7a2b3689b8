"""The kernels compiled without a GPU: no spills, shared memory that exists, tensor cores, costs within budget."""

from dataclasses import astuple

import pytest
import torch
from planned import run_gemm

from fastlora.kernels.config import GemmConfig, gemm_candidates
from fastlora.kernels.target import TENSOR_MEMORY_COLUMNS
from tools.aot import offline
from tools.budgets import over_budget, recorded
from tools.cases import TARGETS, CompileCase, gated_cases
from tools.measure import faults, measure
from tools.sass import read_cubin


@pytest.mark.parametrize("case", gated_cases(), ids=str)
def test_kernels(case: CompileCase) -> None:
    rows = measure(case)
    assert rows
    complaints = [f"{row.key}: {fault}" for row in rows for fault in faults(row)]
    complaints += [f"{row.key}: {fault}" for row in rows for fault in over_budget(row, recorded().get(row.key, {}))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("step", "product", "bound"), [("forward", "S", 6.0), ("backward", "dA", 8.0)])
def test_the_mask_costs_few_instructions(capability: int, step: str, product: str, bound: float) -> None:
    """In the loop over x, per element: Philox alone takes 3 on sm_90, the bits of dA one."""
    (row,) = (row for row in measure(CompileCase(step, "bfloat16", 16, capability)) if row.product == product and row.dropout)
    assert row.sass.loop["imad"]
    assert row.sass.loop["tensor"]
    assert row.per_masked_element is not None
    assert 0 < row.per_masked_element <= bound


@pytest.mark.parametrize(
    ("capability", "config"),
    [
        pytest.param(capability, config, id=f"sm{capability}-{'x'.join(map(str, astuple(config)))}")
        for capability in (90, 100)
        for config in gemm_candidates(torch.bfloat16, "ieee")
        if config.is_valid(TARGETS[capability], torch.bfloat16, "ieee", descriptors=True)
    ],
)
def test_tiles_of_the_tuner(capability: int, config: GemmConfig) -> None:
    """Every valid tile of the GEMM fits in registers and memories, in forward and in the masked backward."""
    target = TARGETS[capability]

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, weight = meta(8192, 4096), meta(4096, 4096)
    U, bits = meta(8192, 16, dtype=torch.float32), meta(8192, 512, dtype=torch.uint8)
    with offline(capability) as launches:
        run_gemm(rows, weight.t(), U, meta(4096, 16).t(), target, alpha=2.0, config=config)
        run_gemm(rows, weight, U, meta(16, 4096), target, alpha=2.0, bits=bits, config=config)
    for launch in launches:
        assert launch.constexprs["BLOCK_M"] == config.block_m
        sass = read_cubin(launch.compiled.asm["cubin"])
        assert (sass.stack, sass.local) == (0, 0)
        assert launch.compiled.metadata.shared <= target.shared_memory
        assert (launch.compiled.metadata.tmem_size or 0) <= TENSOR_MEMORY_COLUMNS
