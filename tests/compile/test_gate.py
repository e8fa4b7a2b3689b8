"""The compile tests see planted faults: in machine code, and in the facts of a kernel."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from tools.aot import GFX942, offline
from tools.budgets import cost, over_budget
from tools.cases import CompileCase
from tools.measure import KernelFacts, faults, measure
from tools.sass import Sass, read_amdgcn, read_kernel


@triton.jit
def product_kernel(a, b, c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ATOMIC: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    product = tl.dot(tl.load(a + m[:, None] * BLOCK_K + k), tl.load(b + k[:, None] * BLOCK_N + n), input_precision="ieee")
    if ATOMIC:
        tl.atomic_add(c + m[:, None] * BLOCK_N + n, product)
    else:
        tl.store(c + m[:, None] * BLOCK_N + n, product)


def product(capability: int, m: int, n: int, dtype: torch.dtype = torch.bfloat16, atomic: bool = False) -> Sass:
    """The machine code of c = a b, (m, 64) times (64, n), in one program of four warps."""
    a, b, c = (torch.empty(size, device="meta") for size in ((m, 64), (64, n), (m, n)))
    with offline(capability) as launches:
        options = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "ATOMIC": atomic, "num_warps": 4, "num_stages": 1}
        launch.launch(launch.Plan(product_kernel, (1,), (), options), a.to(dtype), b.to(dtype), c)
    return read_kernel(launches[0].compiled.asm)


@pytest.mark.parametrize("capability", [80, 90, 100, GFX942])
def test_instructions_are_seen(capability: int) -> None:
    """Tensor cores, wgmma for tiles of at least 64 rows on capability 90, and atomics."""
    plain, half_a_tile = product(capability, 64, 64), product(capability, 32, 64)
    assert plain.tensor_core
    assert half_a_tile.tensor_core
    assert (plain.hgmma > 0, half_a_tile.hgmma) == (capability == 90, 0)
    assert (product(capability, 64, 64, torch.float32).tensor_core > 0) == (capability == GFX942)
    assert not plain.atomics
    assert product(capability, 64, 64, atomic=True).atomics


@pytest.mark.parametrize("capability", [80, 90])
def test_spills_are_seen(capability: int) -> None:
    fits, spills = product(capability, 64, 128), product(capability, 128, 512)
    assert (fits.stack, fits.local) == (0, 0)
    assert spills.stack
    assert spills.local


def test_spills_of_an_amd_gpu_are_seen() -> None:
    code = "\tscratch_store_dwordx2 off, v[0:1], off\n\tglobal_load_ushort v2, v[0:1], off\n\tscratch_load_dword v1, off, off\n"
    metadata = "    .private_segment_fixed_size: 8\n    .vgpr_count:     256\n    .vgpr_spill_count: 3\n"
    seen = read_amdgcn(code + metadata)
    assert (seen.registers, seen.stack, seen.local, seen.narrow_loads, seen.instructions) == (256, 12, 2, 1, 3)
    with pytest.raises(ValueError, match="metadata"):
        read_amdgcn(code)


@pytest.fixture(scope="module")
def gemm() -> KernelFacts:
    """dx of a bfloat16 step for capability 90, with dropout."""
    return measure(CompileCase("backward", "bfloat16", 16, 90))[-1]


PLANTS = {
    "8 bytes of stack": lambda row: replace(row, sass=replace(row.sass, stack=8)),
    "2 loads and stores of local": lambda row: replace(row, sass=replace(row.sass, local=2)),
    "atomics": lambda row: replace(row, sass=replace(row.sass, atomics=1)),
    "shared memory": lambda row: replace(row, shared=227 * 1024 + 1),
    "tensor memory": lambda row: replace(row, tensor_memory=513),
    "rewritten: 1 in PTX, R1 of": lambda row: replace(row, rewritten_in_ptx=("R1 of",)),
    "rewritten: 1 in machine code": lambda row: replace(row, sass=replace(row.sass, rewritten=("R1 of",))),
    "no tensor-core instruction": lambda row: replace(row, sass=replace(row.sass, tensor_core=0, hgmma=0)),
    "no HGMMA": lambda row: replace(row, sass=replace(row.sass, hgmma=0)),
}


@pytest.mark.parametrize("fault", PLANTS)
def test_faults_are_named(gemm: KernelFacts, fault: str) -> None:
    assert gemm.product == "dx"
    assert faults(gemm) == []
    assert [fault in found for found in faults(PLANTS[fault](gemm))] == [True]


def test_float32_products_without_tensor_cores_are_allowed(gemm: KernelFacts) -> None:
    scalar = replace(gemm, sass=replace(gemm.sass, tensor_core=0, hgmma=0))
    assert faults(replace(scalar, case=replace(gemm.case, dtype="float32-ieee"))) == []
    assert faults(replace(scalar, case=replace(gemm.case, dtype="float32-tf32")))


@pytest.mark.parametrize("name", ["conversions", "narrow_loads", "per_masked_element"])
def test_a_lower_budget_is_exceeded(gemm: KernelFacts, name: str) -> None:
    budget = cost(gemm)
    assert over_budget(gemm, budget) == []
    assert len(over_budget(gemm, budget | {name: budget[name] - 0.5})) == 1
    assert len(over_budget(gemm, {kept: value for kept, value in budget.items() if kept != name})) == 1
