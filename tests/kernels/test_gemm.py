"""gemm.py: C = P Q + bias + mask(alpha · U V) of one launch against float64."""

import numpy as np
import pytest
import torch
from planned import AMPERE, DTYPES, VIEWS, assert_close, far_apart, run_gemm

from fastlora.kernels import gemm as gemm_module
from fastlora.kernels import launch
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.gemm import plan_gemm
from fastlora.kernels.target import INTERPRETER
from fastlora.kernels.tensor_spec import TensorSpec

TARGETS = {"descriptors": INTERPRETER, "pointers": AMPERE}


def exact(P, Q, U, V, alpha=1.0, bias=0.0, keep=1.0):
    product = 0.0 if P is None else P.double() @ Q.double()
    return product + bias + keep * alpha * (U.double() @ V.double())


@pytest.fixture
def plans(monkeypatch):
    """The plans that are launched."""
    seen, run = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda plan, *args: seen.append(plan) or run(plan, *args))
    return seen


@pytest.mark.parametrize("product", [True, False], ids=["whole", "LoRA term alone"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("path", TARGETS)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_against_float64(dtype, adapter, path, view, product):
    """With a strided bias, and a mask of which the last byte of a row is not full."""
    P, Q, V = (
        VIEWS[view](torch.randn(*shape).to(to)) for shape, to in (((37, 70), dtype), ((70, 133), dtype), ((5, 133), adapter))
    )
    U, bias, keep = torch.randn(37, 5), torch.randn(266).to(dtype)[::2], torch.rand(37, 133) < 0.5
    bits = torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    operands = (P, Q, U, V) if product else (None, None, U, V.to(dtype))
    C = run_gemm(*operands, TARGETS[path], alpha=0.5, bias=bias, bits=bits)
    assert_close(C, exact(*operands, 0.5, bias.double(), keep.double()), dtype)


@pytest.mark.parametrize("rank", [3, 130])
@pytest.mark.parametrize("path", TARGETS)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (0, 8, 8), (8, 0, 8), (8, 8, 0), (300, 24, 264), (72, 64, 136)])
def test_any_shape(M, K, N, path, rank):
    """Tiny, empty, more tiles than programs, aligned: written to `out`."""
    operands = torch.randn(M, K), torch.randn(K, N), torch.randn(M, rank), torch.randn(rank, N)
    out = torch.full((M, N), torch.nan)
    assert run_gemm(*operands, TARGETS[path], out=out) is out
    assert_close(out, exact(*operands), torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", TARGETS)
def test_aligned_operands_go_through_descriptors(plans, path, transposed):
    """A weight stored (in, out) as well.  Below capability 9.0, and for rows that start elsewhere than at
    multiples of 16 bytes, through pointers."""
    P, Q, U, V = torch.randn(40, 64), torch.randn(64, 48), torch.randn(40, 4), torch.randn(4, 48)
    stored = Q.t().contiguous().t() if transposed else Q
    assert_close(run_gemm(P, stored, U, V, TARGETS[path]), exact(P, Q, U, V), torch.float32)
    run_gemm(P[:, 1:], stored[1:], U, V, TARGETS[path])
    assert [plan.options["DESCRIPTORS"] for plan in plans] == [path == "descriptors", False]
    assert plans[0].options["Q_TRANSPOSED"] == transposed


@pytest.mark.parametrize(
    ("rank", "adapter", "transposed", "flatten"),
    [(5, torch.bfloat16, False, True), (40, torch.float32, True, True), (70, torch.bfloat16, True, False)],
)
def test_one_loop_over_the_steps_of_several_tiles(plans, rank, adapter, transposed, flatten):
    """10 tiles on four programs: some make three, some two.  Two steps each, the last one not full."""
    P, Q, U, V = torch.randn(70, 72), torch.randn(72, 264), torch.randn(70, rank), torch.randn(rank, 264).to(adapter)
    P, Q, bias, keep = P.bfloat16(), Q.bfloat16(), torch.randn(264).bfloat16(), torch.rand(70, 264) < 0.5
    bits = torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    stored = Q.t().contiguous().t() if transposed else Q
    C = run_gemm(P, stored, U, V, alpha=0.5, bias=bias, bits=bits, config=GemmConfig(64, 64, 64, 32, 4, 3))
    assert_close(C, exact(P, Q, U, V, 0.5, bias.double(), keep.double()), torch.bfloat16)
    (plan,) = plans
    assert (plan.grid, plan.options["FLATTEN"]) == ((4,), flatten)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_descriptors_round_to_tf32(precision, monkeypatch):
    """Those of P and Q, in tf32, where Triton's descriptors can.  C keeps its 24 bits."""
    monkeypatch.setattr(gemm_module, "DESCRIPTORS_ROUND", True)
    specs = (TensorSpec.new(*shape, dtype=torch.float32) for shape in ((40, 64), (64, 48), (40, 4), (4, 48)))
    plan = plan_gemm(*specs, torch.float32, precision, INTERPRETER)
    assert plan.options["ROUNDED"] == (precision == "tf32")
    assert [facts[3:] for facts in plan.descriptors] == [("zero", True) if precision == "tf32" else ()] * 2 + [()]


def test_a_tile_that_is_not_valid_for_the_operands_is_replaced(plans):
    """A tile of 128 accumulators a thread runs with descriptors only."""
    tile = GemmConfig(128, 256, 64, 32, 8, 3)
    for cols in (256, 250):
        operands = torch.randn(40, 64), torch.randn(64, cols), torch.randn(40, 4), torch.randn(4, cols)
        P, Q, U, V = (t.bfloat16() if index != 2 else t for index, t in enumerate(operands))
        assert_close(run_gemm(P, Q, U, V, config=tile), exact(P, Q, U, V), torch.bfloat16)
    assert [plan.options["BLOCK_N"] == 256 for plan in plans] == [True, False]


@pytest.mark.parametrize("path", TARGETS)
def test_offsets_beyond_32_bits(path):
    x, W, A = far_apart(3, 32, (1 << 30) + 8), far_apart(24, 32, (1 << 27) + 8), far_apart(4, 32, (1 << 30) + 8)
    B, U = torch.randn(24, 4).half(), torch.randn(3, 4)
    for P, Q, V in ((x, W.t(), B.t()), (x[:, :24], W, A)):
        assert_close(run_gemm(P, Q, U, V, TARGETS[path], alpha=0.5), exact(P, Q, U, V, 0.5), x.dtype)
