"""The performance test that needs no GPU: how often each step launches, and what each launch loads and stores.

The expected numbers are shape arithmetic on what design and docstrings promise: x is read once by S and once by dA, dy once by
dS and dB together, outputs are written once, and a GEMM of tiles_m × tiles_n tiles reads P tiles_n times and Q tiles_m times.
Only the sizes of the tiles are taken from the launches.
"""

import collections
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton

from fastlora import Projection, lora_linear, lora_linears
from fastlora.kernels import steps
from fastlora.kernels.grad_b import MAX_RANK
from fastlora.kernels.target import INTERPRETER, Target
from tools.traffic import CountedLaunch, counted
from tools.traffic_report import DTYPES, FORMS, TrafficCase, by_step

MANY = Target(90, 64, INTERPRETER.shared_memory)  # more than there is work for: everything is split
AMPERE = Target(80, 4, INTERPRETER.shared_memory)  # no tensor descriptors
OPERANDS = {
    "aligned": TrafficCase(128, 256, 512),
    "split": TrafficCase(192, 512, 128, r=8, target=MANY),
    "ragged": TrafficCase(131, 205, 333, r=5, bias=False),
    "ragged-split": TrafficCase(135, 517, 135, r=20, dtype="float16+float32", target=MANY),
    "small": TrafficCase(3, 40, 24, r=2, dtype="float32"),
    "float32-adapters": TrafficCase(128, 256, 512, dtype="bfloat16+float32"),
    "two-passes": TrafficCase(135, 128, 512, r=MAX_RANK + 1, target=MANY),
    "two-rank-blocks": TrafficCase(72, 144, 136, r=130),
    "no-dropout": TrafficCase(128, 256, 192, dropout_p=0.0),
    "pointers": TrafficCase(128, 256, 192, target=AMPERE),
}
CASES = [pytest.param(replace(case, form=form), id=f"{name}-{form}") for name, case in OPERANDS.items() for form in FORMS]
PRODUCTS = {"fused": (["gemm"], ["gemm"]), "addmm": (["gemm", "addmm_"], ["addmm_"])}  # of forward, of backward
Expected = tuple[int, Any]  # (bytes that an operand holds, loads of each element: an array or one number; 0: it is stored once)

pytestmark = pytest.mark.usefixtures("unpoisoned")


@functools.cache
def steps_of(case: TrafficCase) -> dict[str, list[CountedLaunch]]:
    forward, backward = case.run()
    return by_step(forward) | by_step(backward)


def names(launches: list[CountedLaunch]) -> list[str]:
    return [launch.kernel for launch in launches]


def itemsizes(case: TrafficCase) -> tuple[int, int]:
    """Bytes of an element of x, of A."""
    base, adapter = DTYPES[case.dtype]
    return base.itemsize, adapter.itemsize


def check(launch: CountedLaunch, **expected: Expected) -> None:
    """The launch has the operands expected, those of no bytes left out, and moves them as expected, without atomics."""
    assert {operand.name for operand in launch.operands} == {name for name, (size, _) in expected.items() if size}
    assert launch.atomics == 0
    assert launch.counted == (launch.kernel != "addmm_")
    for operand in launch.operands:
        size, loads = expected[operand.name]
        assert np.prod(operand.shape) * operand.itemsize == size, operand.name
        assert (operand.loads == loads).all(), operand.name
        assert (operand.stores == (operand.name == "self" or np.max(loads) == 0)).all(), operand.name


def check_sums(sums: list[CountedLaunch], *results: tuple[int, int, int]) -> None:
    """Of (parts, elements, bytes an element): the partial sums of those in several parts are added by one launch."""
    split = [result for result in results if result[0] > 1]
    expected: dict[str, Expected] = {}
    for (parts, elements, itemsize), prefix in zip(split, ("", "other_"), strict=False):
        expected |= {f"{prefix}partials": (parts * elements * 4, 1), f"{prefix}out": (elements * itemsize, 0)}
    assert names(sums) == ["sum_partials"] * bool(split)
    for launch in sums:
        check(launch, **expected)


@pytest.mark.parametrize("case", CASES)
def test_launches(case):
    """One kernel a step, and of torch nothing but cuBLAS."""
    launches = [launch for step in steps_of(case).values() for launch in step]
    forward, backward = PRODUCTS[case.form]
    first = ["grad_b"] if case.r <= MAX_RANK else ["shrink", "grad_a"]
    expected = ["shrink", *forward, *first, "grad_a", *backward]
    assert [name for name in names(launches) if name != "sum_partials"] == expected


@pytest.mark.parametrize("case", CASES)
def test_S_reads_x_once(case):
    (M, K, r), (e, a) = (case.M, case.K, case.r), itemsizes(case)
    launch, *sums = steps_of(case)["S"]
    rows, parts, ranks = launch.grid
    assert ranks == triton.cdiv(r, 128)
    seed = 8 * (case.dropout_p > 0), rows * parts * ranks
    check(launch, x=(M * K * e, ranks), A=(r * K * a, rows), seed=seed, out=(parts * M * r * 4, 0))
    check_sums(sums, (parts, M * r, 4))


@pytest.mark.parametrize("case", CASES)
def test_one_pass_over_dy(case):
    """dS and dB in one pass up to MAX_RANK, each in its own above."""
    (M, N, r), (e, a) = (case.M, case.N, case.r), itemsizes(case)
    launches = steps_of(case)["dS dB"]
    if r <= MAX_RANK:
        grad_b, *sums = launches
        cols, parts = grad_b.grid
        operands = {"dy": (M * N * e, 1), "B": (N * r * a, parts), "S": (M * r * 4, cols)}
        check(grad_b, **operands, dS=(cols * M * r * 4, 0), dB=(parts * N * r * (4 if parts > 1 else a), 0))
        check_sums(sums, (cols, M * r, 4))
    else:
        second = names(launches).index("grad_a")
        to_dS, to_dB, sums = launches[0], launches[second], launches[second + 1 :]
        rows, parts, ranks = to_dS.grid
        check(to_dS, x=(M * N * e, ranks), A=(N * r * a, rows), out=(parts * M * r * 4, 0))
        check_sums(sums, (parts, M * r, 4))
        cols, parts, ranks = to_dB.grid
        check(to_dB, x=(M * N * e, ranks), U=(M * r * 4, cols), out=(parts * N * r * (4 if parts > 1 else a), 0))


@pytest.mark.parametrize("case", CASES)
def test_dA_reads_x_once(case):
    """And on the way writes the mask's bits, an eighth of a byte an element, or in the form addmm the masked term of dx.

    The sums of dB's parts wait for those of dA, to be added by the same launch.
    """
    (M, K, r), (e, a) = (case.M, case.K, case.r), itemsizes(case)
    launch, *sums = steps_of(case)["dA"]
    cols, parts, ranks = launch.grid
    addmm, dropout = case.form == "addmm", case.dropout_p > 0
    again = addmm and r > launch.constexprs["BLOCK_R"]  # otherwise the term takes U as dA has it, and V as it was read once
    check(
        launch,
        x=(M * K * e, ranks),
        U=(M * r * 4, cols * (1 + again)),
        V=(r * K * a * addmm, triton.cdiv(M, launch.constexprs["BLOCK_M"]) if again else parts),
        seed=(8 * dropout, cols * parts * ranks),
        out=(parts * r * K * (4 if parts > 1 else a), 0),
        bits=(M * triton.cdiv(K, 8) * (dropout and not addmm), 0),
        dx=(M * K * e * addmm, 0),
    )
    of_dB = next(launch for launch in steps_of(case)["dS dB"] if launch.kernel in ("grad_b", "grad_a"))
    check_sums(sums, (parts, r * K, a), (of_dB.grid[1], case.N * r, a))


def tile_loads(launch: CountedLaunch, size: int, block: str, times: int) -> np.ndarray:
    """Loads of each of `size` rows that tiles of `block` rows read `times` times.

    Through pointers, the rows of a tile that lie beyond the matrix read row 0 instead.
    """
    loads = np.full((size, 1), times)
    if not launch.constexprs["DESCRIPTORS"]:
        loads[0] += times * (-size % launch.constexprs[block])
    return loads


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_gemm(case, direction):
    """C (M, N) = P (M, K) Q (K, N) + bias + mask(U V): C is written once, tiles read the operands again.

    With FLATTEN each program reads the term of the last tile once more, for nothing.
    cuBLAS accumulates P Q onto C in place; neither is copied nor cast first.
    """
    (e, a), forward = itemsizes(case), direction == "forward"
    M, N, K, r = (case.M, case.N, case.K, case.r) if forward else (case.M, case.K, case.N, case.r)
    launches = steps_of(case)["y" if forward else "dx"]
    if case.form == "addmm":
        check(launches.pop(), self=(M * N * e, 1), mat1=(M * K * e, 1), mat2=(K * N * e, 1))
    assert len(launches) == (forward or case.form == "fused")
    for launch in launches:
        tiles_m, tiles_n = (triton.cdiv(size, launch.constexprs[f"BLOCK_{axis}"]) for axis, size in (("M", M), ("N", N)))
        product, Q = case.form == "fused", tile_loads(launch, N, "BLOCK_N", tiles_m)
        programs = launch.grid[0] * launch.constexprs["FLATTEN"]
        row, col = (np.arange(size)[:, None] for size in (M, N))
        last_m = row >= (tiles_m - 1) * launch.constexprs["BLOCK_M"]
        last_n = col >= (tiles_n - 1) * launch.constexprs["BLOCK_N"]
        V = tiles_m + programs * last_n
        check(
            launch,
            P=(M * K * e * product, tile_loads(launch, M, "BLOCK_M", tiles_n)),
            Q=(K * N * e * product, Q if forward else Q.T),  # W (N, K) or W (K, N)
            U=(M * r * 4, tiles_n + programs * last_m),
            V=(r * N * a, V if forward else V.T),
            bias=(N * e * (forward and case.bias), V[:, 0]),
            bits=(M * triton.cdiv(N, 8) * (not forward and case.dropout_p > 0), 1 + programs * last_m * last_n.T[:, ::8]),
            C=(M * N * e, 0),
        )


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
def test_backward_without_x_packs_the_mask_from_the_seed(form):
    M, K, N, r = 67, 205, 96, 4
    dy, weight, A, B = torch.randn(M, N), torch.randn(N, K), torch.randn(r, K), torch.randn(N, r)
    with counted() as launches:
        steps.backward(dy, None, weight, A, B, None, torch.tensor([7]), 2.0, 0.1, A.dtype, choice=form)
    assert names(launches) == ["shrink", "pack_bits", "gemm"] + ["addmm_"] * (form == "addmm")
    _, pack_bits, gemm, *_ = launches
    bits = M * triton.cdiv(K, 8)
    check(pack_bits, seed=(8, pack_bits.grid[0] * pack_bits.grid[1]), bits=(bits, 0))
    assert gemm["bits"].bytes_loaded == bits


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_projections_share_their_passes(dropout_p):
    """S of all reads x once, dA of all reads it once, and dx is one tensor: nothing adds up gradients."""
    x = torch.randn(96, 256, requires_grad=True)
    shapes = [(256, 8), (64, 8), (64, 8)]
    weights = [(torch.randn(N, 256), torch.randn(r, 256), torch.randn(N, r).requires_grad_()) for N, r in shapes]
    projections = [Projection(*own, dropout_p=dropout_p) for own in weights]
    with counted() as launches:
        ys = lora_linears(x, projections, backend="addmm")
        torch.autograd.grad(ys, [x, *(own[2] for own in weights)], [torch.ones_like(y) for y in ys])
    shrink, grad_a = (next(launch for launch in launches if launch.kernel == name) for name in ("shrink", "grad_a"))
    assert (shrink["x"].loads == 1).all()
    assert (grad_a["x"].loads == 1).all()
    assert (grad_a["dx"].stores == 1).all()
    assert not grad_a["dx"].loads.any()
    done = collections.Counter(names(launches))
    assert done["shrink"] == done["grad_a"] == 1
    assert done["gemm"] == done["grad_b"] == 3
    assert done["addmm_"] == 6
    assert not done["add"]
    assert not done["add_"]
