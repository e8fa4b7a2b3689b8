"""The performance test that needs no GPU: how often each step launches, and what each launch loads and stores.

The expected numbers are shape arithmetic on what design and docstrings promise: x is read once by S and once by dA, dy once by
dS and dB together, outputs are written once, and a GEMM of tiles_m × tiles_n tiles reads P tiles_n times and Q tiles_m times.
Only the sizes of the tiles are taken from the launches.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton

from fastlora import lora_linear
from fastlora.kernels import steps
from fastlora.kernels.grad_b import MAX_RANK
from fastlora.kernels.target import INTERPRETER, Target
from tools.traffic import Launch, counted
from tools.traffic_report import FORMS, Case, by_step

MANY = Target(90, 64, INTERPRETER.shared_memory)  # more than there is work for: everything is split
AMPERE = Target(80, 4, INTERPRETER.shared_memory)  # no tensor descriptors
OPERANDS = {
    "aligned": Case(256, 384, 1024),
    "split": Case(256, 512, 320, r=8, target=MANY),
    "ragged": Case(131, 205, 333, r=5, bias=False),
    "ragged-split": Case(263, 517, 391, r=20, dtype="float16+float32", target=MANY),
    "small": Case(3, 40, 24, r=2, dtype="float32"),
    "float32-adapters": Case(256, 384, 1024, dtype="bfloat16+float32"),
    "two-passes": Case(192, 256, 320, r=MAX_RANK + 1, target=MANY),
    "two-rank-blocks": Case(72, 144, 136, r=130),
    "no-dropout": Case(128, 256, 192, dropout_p=0.0),
    "pointers": Case(128, 256, 192, target=AMPERE),
}
CASES = [pytest.param(replace(case, form=form), id=f"{name}-{form}") for name, case in OPERANDS.items() for form in FORMS]
PRODUCTS = {"fused": (["gemm"], ["gemm"]), "addmm": (["gemm", "addmm_"], ["addmm_"])}  # of forward, of backward
WRITTEN = {
    "shrink": {"out"},
    "gemm": {"C"},
    "grad_b": {"dS", "dB"},
    "grad_a": {"out", "bits", "dx"},
    "pack_bits": {"bits"},
    "sum_partials": {"out", "other_out"},
    "addmm_": {"self"},
}


pytestmark = pytest.mark.usefixtures("unpoisoned")


@functools.cache
def steps_of(case: Case) -> dict[str, list[Launch]]:
    forward, backward = case.run()
    return by_step(forward) | by_step(backward)


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


def blocks(launch: Launch, size: int, name: str) -> int:
    return triton.cdiv(size, launch.constexprs[name])


def sizes(case: Case) -> tuple[int, int]:
    """Bytes of an element of x, of A."""
    return (4 if case.dtype == "float32" else 2), (4 if case.dtype.endswith("float32") else 2)


def check_sums(sums: list[Launch], *results: tuple[int, int, int]) -> None:
    """Results of so many parts, elements and bytes an element: the partial sums of those in several are added by one launch."""
    split = [result for result in results if result[0] > 1]
    assert names(sums) == ["sum_partials"] * bool(split)
    for (parts, elements, itemsize), prefix in zip(split, ("", "other_"), strict=False):
        partials, out = sums[0][prefix + "partials"], sums[0][prefix + "out"]
        assert partials.bytes_loaded == parts * elements * 4
        assert (partials.loads == 1).all()
        assert out.bytes_stored == elements * itemsize


@pytest.mark.parametrize("case", CASES)
def test_launches(case):
    """A kernel a step, none of torch but cuBLAS, and every output written once, without atomics."""
    launches = [launch for step in steps_of(case).values() for launch in step]
    forward, backward = PRODUCTS[case.form]
    first = ["grad_b"] if case.r <= MAX_RANK else ["shrink", "grad_a"]
    expected = ["shrink", *forward, *first, "grad_a", *backward]
    assert [name for name in names(launches) if name != "sum_partials"] == expected
    for launch in launches:
        assert launch.atomics == 0
        assert launch.counted == (launch.kernel != "addmm_")
        for operand in launch.operands:
            written = operand.name in WRITTEN[launch.kernel]
            assert (operand.stores == written).all(), f"{launch.kernel} {operand.name}"
            assert written or (operand.loads >= 1).all(), f"{launch.kernel} {operand.name}"


@pytest.mark.parametrize("case", CASES)
def test_S_reads_x_once(case):
    first, *sums = steps_of(case)["S"]
    e, a = sizes(case)
    row_blocks, parts, rank_blocks = first.grid
    assert row_blocks == blocks(first, case.M, "BLOCK_M")
    assert rank_blocks == triton.cdiv(case.r, 128)
    assert (first["x"].loads == rank_blocks).all()
    assert first["x"].bytes_loaded == case.M * case.K * e * rank_blocks
    assert (first["A"].loads == row_blocks).all()
    assert first["A"].bytes_loaded == case.r * case.K * a * row_blocks
    assert first["out"].bytes_stored == parts * case.M * case.r * 4
    if case.dropout_p:
        assert first["seed"].bytes_loaded == 8 * row_blocks * parts * rank_blocks
    check_sums(sums, (parts, case.M * case.r, 4))


@pytest.mark.parametrize("case", CASES)
def test_one_pass_over_dy(case):
    """dS and dB in one pass up to MAX_RANK, each in its own above."""
    launches = steps_of(case)["dS dB"]
    e, a = sizes(case)
    M, N, r = case.M, case.N, case.r
    if case.r > MAX_RANK:
        second = names(launches).index("grad_a")
        for launch in (launches[0], launches[second]):
            assert (launch["x"].loads == launch.grid[2]).all()
            assert launch["x"].bytes_loaded == M * N * e * launch.grid[2]
        assert launches[second]["U"].bytes_loaded == M * r * 4 * launches[second].grid[0]
        check_sums(launches[second + 1 :], (launches[0].grid[1], M * r, 4))
        return
    grad_b, *sums = launches
    col_blocks, parts = grad_b.grid
    assert (grad_b["dy"].loads == 1).all()
    assert grad_b["dy"].bytes_loaded == M * N * e
    assert grad_b["B"].bytes_loaded == parts * N * r * a
    assert grad_b["S"].bytes_loaded == col_blocks * M * r * 4
    assert grad_b["dS"].bytes_stored == col_blocks * M * r * 4
    assert grad_b["dB"].bytes_stored == parts * N * r * (4 if parts > 1 else a)
    check_sums(sums, (col_blocks, M * r, 4))


@pytest.mark.parametrize("case", CASES)
def test_dA_reads_x_once(case):
    """And on the way writes the mask's bits, an eighth of a byte an element, or in the addmm form the masked term of dx.

    The sums of dB's parts wait for those of dA, to be added by the same launch.
    """
    first, *sums = steps_of(case)["dA"]
    e, a = sizes(case)
    col_blocks, parts, rank_blocks = first.grid
    addmm = case.form == "addmm"
    row_blocks = blocks(first, case.M, "BLOCK_M")
    assert (first["x"].loads == rank_blocks).all()
    assert first["x"].bytes_loaded == case.M * case.K * e * rank_blocks
    again = addmm and case.r > first.constexprs["BLOCK_R"]  # else the term takes U as dA has it, and V as it was read once
    assert first["U"].bytes_loaded == case.M * case.r * 4 * col_blocks * (1 + again)
    assert first["out"].bytes_stored == parts * case.r * case.K * (4 if parts > 1 else a)
    bits = case.M * triton.cdiv(case.K, 8) if case.dropout_p and not addmm else 0
    expected = {"x", "U", "out"} | ({"bits"} if bits else set()) | ({"seed"} if case.dropout_p else set())
    assert {operand.name for operand in first.operands} == expected | ({"V", "dx"} if addmm else set())
    if bits:
        assert first["bits"].bytes_stored == bits
    if addmm:
        assert first["dx"].bytes_stored == case.M * case.K * e
        assert first["V"].bytes_loaded == case.r * case.K * a * (row_blocks if again else parts)
    of_dB = next(launch for launch in steps_of(case)["dS dB"] if launch.kernel in ("grad_b", "grad_a"))
    check_sums(sums, (parts, case.r * case.K, a), (of_dB.grid[1], case.N * case.r, a))


def check_gemm(launch: Launch, sizes: tuple[int, int, int, int], itemsizes: tuple[int, int], product: bool = True) -> None:
    """C (M, N) = P (M, K) Q (K, N) + bias + mask(U V): C is written once, the operands are re-read by tiles."""
    (M, N, K, r), (e, a) = sizes, itemsizes
    tiles_m, tiles_n = blocks(launch, M, "BLOCK_M"), blocks(launch, N, "BLOCK_N")
    assert launch["C"].bytes_stored == M * N * e
    assert launch["U"].bytes_loaded == M * r * 4 * tiles_n
    assert launch["V"].bytes_loaded == r * N * a * tiles_m
    if launch.constexprs["HAS_BIAS"]:
        assert launch["bias"].bytes_loaded == N * e * tiles_m
    if launch.constexprs["HAS_MASK"]:
        assert (launch["bits"].loads == 1).all()
        assert launch["bits"].bytes_loaded == M * triton.cdiv(N, 8)
    if not product:
        return
    # Through pointers, the rows and columns of a tile that lie beyond C read row and column 0 instead.
    whole_tiles = not launch.constexprs["DESCRIPTORS"]
    rows = tiles_m * launch.constexprs["BLOCK_M"] if whole_tiles else M
    cols = tiles_n * launch.constexprs["BLOCK_N"] if whole_tiles else N
    assert launch["P"].bytes_loaded == rows * K * e * tiles_n
    assert launch["Q"].bytes_loaded == cols * K * e * tiles_m
    if not whole_tiles:
        assert (launch["P"].loads == tiles_n).all()
        assert (launch["Q"].loads == tiles_m).all()


def check_vendor(launch: Launch, sizes: tuple[int, int, int], e: int) -> None:
    """C += P Q in place, neither copied nor cast first."""
    M, N, K = sizes
    assert launch.kernel == "addmm_"
    traffic = {operand.name: (operand.bytes_loaded, operand.bytes_stored) for operand in launch.operands}
    assert traffic == {"self": (M * N * e, M * N * e), "mat1": (M * K * e, 0), "mat2": (K * N * e, 0)}


@pytest.mark.parametrize("case", CASES)
def test_gemm_forward(case):
    gemm, *vendor = steps_of(case)["y"]
    e, a = sizes(case)
    assert gemm.constexprs["HAS_BIAS"] == case.bias
    assert not gemm.constexprs["HAS_MASK"]
    check_gemm(gemm, (case.M, case.N, case.K, case.r), (e, a), case.form == "fused")
    assert len(vendor) == (case.form == "addmm")
    for launch in vendor:
        check_vendor(launch, (case.M, case.N, case.K), e)


@pytest.mark.parametrize("case", CASES)
def test_gemm_backward(case):
    (launch,) = steps_of(case)["dx"]
    e, a = sizes(case)
    if case.form == "fused":
        assert launch.constexprs["HAS_MASK"] == (case.dropout_p > 0)
        check_gemm(launch, (case.M, case.K, case.N, case.r), (e, a))
    else:
        check_vendor(launch, (case.M, case.K, case.N), e)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_launches_nothing_besides(form, adapter, dimensions):
    """From lora_linear down, forward and backward run one draw of a seed and the launches of the steps: no copy, no cast."""
    M, K, N, r = 48, 64, 80, 4
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    if dimensions == 3:
        x, dy = x.view(2, 24, K), dy.view(2, 24, N)
    weight, bias = torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    A, B = (torch.randn(*shape).to(adapter).requires_grad_() for shape in ((r, K), (N, r)))
    x.requires_grad_()
    with counted() as launches:
        y = lora_linear(x, weight, A, B, bias, scaling=2.0, dropout_p=0.1, backend=form)
        torch.autograd.grad(y, (x, A, B), dy)
    forward, backward = PRODUCTS[form]
    assert names(launches) == ["randint", "shrink", *forward, "grad_b", "grad_a", *backward]


@pytest.mark.parametrize("form", FORMS)
def test_float32_adapters_make_no_float32_copy(form):
    """Nothing of the size of x, W, dy, y or dx is in float32, and S and dA read the bytes of x that they read beside 16-bit
    adapters."""
    case = replace(OPERANDS["float32-adapters"], form=form)
    steps, plain = steps_of(case), steps_of(replace(case, dtype="bfloat16"))
    operands = [operand for launches in steps.values() for launch in launches for operand in launch.operands]
    smallest = min(case.M, case.N) * case.K
    large = [operand for operand in operands if operand.name != "out" and np.prod(operand.shape) >= smallest]
    assert {operand.name for operand in large} >= {"x", "dy"}
    assert all(operand.itemsize == 2 for operand in large)
    for step in ("S", "dA"):
        assert steps[step][0]["x"].bytes_loaded == plain[step][0]["x"].bytes_loaded == case.M * case.K * 2


@pytest.mark.parametrize("form", FORMS)
def test_backward_without_x_packs_the_mask_from_the_seed(form):
    M, K, N, r = 67, 205, 96, 4
    dy, weight, A, B = torch.randn(M, N), torch.randn(N, K), torch.randn(r, K), torch.randn(N, r)
    with counted() as launches:
        choice = form
        steps.backward(dy, None, weight, A, B, None, torch.tensor([7]), 2.0, 0.1, A.dtype, choice=choice)
    assert names(launches) == ["shrink", "pack_bits", "gemm"] + ["addmm_"] * (form == "addmm")
    pack_bits, gemm = launches[1:3]
    assert (pack_bits["bits"].stores == 1).all()
    assert pack_bits["bits"].bytes_stored == gemm["bits"].bytes_loaded == M * triton.cdiv(K, 8)
    assert pack_bits.total("bytes_loaded") == 8 * pack_bits.grid[0] * pack_bits.grid[1]
    assert (gemm["bits"].loads == 1).all()
