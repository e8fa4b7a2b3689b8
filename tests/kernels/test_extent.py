"""Offsets beyond 2**31 elements, descriptor eligibility and tile choice: pure functions, and one real far-apart tensor."""

import math

import pytest
import torch
from planned import run_gemm, run_grad_a, run_grad_s_and_b, run_shrink

from fastlora import oracle
from fastlora.kernels import launch, steps
from fastlora.kernels.config import MIN_STEPS, GemmConfig, gemm_candidates, gemm_config, rank_block, split_steps
from fastlora.kernels.grad_a import grad_a_kernel
from fastlora.kernels.grad_b import MAX_RANK, grad_b_kernel
from fastlora.kernels.shrink import shrink_kernel
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, needs_int64

TARGETS = {
    "sm_80": Target(80, 108, 166912),
    "sm_86": Target(86, 84, 101376),
    "sm_90": Target(90, 132, 232448),
    "sm_100": Target(100, 148, 232448),
    "small and unknown": Target(121, 20, 101376),
}
STREAMING = (shrink_kernel, grad_a_kernel, grad_b_kernel)
DTYPES = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((1 << 16, 1 << 15), (1 << 15, 1), False),
        ((1 << 16, (1 << 15) + 1), ((1 << 15) + 1, 1), True),
        ((2, 8), ((1 << 31) - 7, 1), True),
        ((2, 8), ((1 << 31) - 8, 1), False),
        ((0, 8), (1 << 40, 1), False),
        ((1 << 20, 1 << 20), (0, 0), False),
    ],
)
def test_needs_int64_looks_at_the_extent(shape, stride, expected):
    assert needs_int64(TensorSpec.of(torch.empty_strided(shape, stride, device="meta"))) == expected


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(4, 64, dtype=torch.bfloat16), True),
        (torch.empty(4, 60, dtype=torch.bfloat16), False),
        (torch.empty(4, 60), True),
        (torch.empty(64, 4).t(), False),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, ::2], False),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, 8:72], True),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, 1:65], False),
        (torch.empty(8, 64)[::2], True),
        (torch.empty(1, 64).expand(4, 64), False),
        (torch.empty(128).unfold(0, 64, 4), False),
        (torch.empty(0, 64), False),
    ],
)
def test_fits_descriptor(tensor, expected):
    assert fits_descriptor(TensorSpec.of(tensor)) == expected


def far_apart(rows: int, cols: int, stride: int) -> torch.Tensor:
    """A random (rows, cols) whose rows lie `stride` elements apart; memory between them is reserved and never touched."""
    storage = torch.empty((rows - 1) * stride + cols, dtype=torch.float16)
    tensor = storage.as_strided((rows, cols), (stride, 1))
    return tensor.copy_(torch.randn(rows, cols))


def test_offsets_beyond_32_bits():
    """Three rows spread over more than 2**31 elements: a wrapped offset would read another place, or none."""
    x = far_apart(3, 32, (1 << 30) + 8)
    assert needs_int64(TensorSpec.of(x))
    A, W = far_apart(4, 32, (1 << 30) + 8), far_apart(24, 32, (1 << 27) + 8)
    U, B = torch.randn(3, 4), torch.randn(24, 4).half()
    exact = x.double()
    S = run_shrink(x, A)
    assert oracle.relative_error(S, exact @ A.double().t()) <= oracle.FLOOR[torch.float32, torch.float32]
    dA, _ = run_grad_a(x, U, torch.float32)
    assert oracle.relative_error(dA, U.double().t() @ exact) <= oracle.FLOOR[torch.float16, torch.float32]
    for target in (INTERPRETER, TARGETS["sm_80"]):
        y = run_gemm(x, W.t(), U, B.t(), target, alpha=0.5)
        expected = exact @ W.double().t() + 0.5 * U.double() @ B.double().t()
        assert oracle.relative_error(y, expected) <= 2 * oracle.FLOOR[torch.float16, torch.float16]
    wide_B = far_apart(24, 4, (1 << 27) + 8)
    dS, dB = run_grad_s_and_b(x[:, :24], wide_B, U, torch.float32)
    assert oracle.relative_error(dS, exact[:, :24] @ wide_B.double()) <= oracle.FLOOR[torch.float32, torch.float32]
    assert oracle.relative_error(dB, exact[:, :24].t() @ U.double()) <= oracle.FLOOR[torch.float16, torch.float32]
    dx = run_gemm(x[:, :24], W, U, A)
    expected = exact[:, :24] @ W.double() + U.double() @ A.double()
    assert oracle.relative_error(dx, expected) <= 2 * oracle.FLOOR[torch.float16, torch.float16]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 4096), (64, 4096), (512, 1024), (8192, 4096), (16384, 28672)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_shape_has_a_valid_tile(name, dtype, precision, rows, cols, descriptors):
    target = TARGETS[name]
    config = gemm_config(rows, cols, dtype, precision, target, descriptors)
    assert config.is_valid(target, dtype, precision, descriptors)
    assert config in set(gemm_candidates(dtype, precision))


def test_large_shapes_get_large_tiles():
    config = gemm_config(8192, 4096, torch.bfloat16, "ieee", TARGETS["sm_90"], True)
    assert (config.block_m, config.block_n, config.num_warps, config.num_stages) == (128, 256, 8, 3)
    config = gemm_config(8192, 4096, torch.bfloat16, "ieee", TARGETS["sm_80"], False)
    assert (config.block_m, config.block_n) == (128, 128)
    few = gemm_config(32, 4096, torch.bfloat16, "ieee", TARGETS["sm_90"], True)
    assert few.block_m * few.block_n < 128 * 128


def test_oversized_tiles_are_invalid():
    spilling = GemmConfig(128, 256, 64, 32, 4, 3)
    too_deep = GemmConfig(128, 256, 64, 32, 8, 4)
    for config in (spilling, too_deep):
        assert not config.is_valid(TARGETS["sm_90"], torch.bfloat16, "ieee", True)


@pytest.mark.parametrize(("rank", "block"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (512, 128)])
def test_rank_block(rank, block):
    assert rank_block(rank) == block


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 64, 1000])
@pytest.mark.parametrize("programs", [0, 1, 5, 128, 10000])
@pytest.mark.parametrize("partial", [0.5, 7.5])
def test_splits_cover_every_step_once(steps, programs, partial):
    parts, each = split_steps(steps, programs, TARGETS["sm_90"], partial)
    assert parts >= 1
    assert (parts - 1) * each < max(steps, 1) <= max(parts * each, 1)
    assert parts == 1 or each >= max(MIN_STEPS, partial)


# From so many MiB of x or dy on at a rank, every kernel that streams them has a program for three of four multiprocessors: a
# part of a reduction is no smaller than its partial sum, which grows with the rank.
FILLED_FROM = {8: 2, 16: 2, 64: 4, 128: 16}
LARGE = 64  # MiB from which on the last round of programs is short


@pytest.mark.parametrize("rank", FILLED_FROM)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(2048, 2048), (2048, 512), (4096, 1024), (8192, 2048), (4096, 14336), (14336, 4096)]
)
@pytest.mark.parametrize("rows", [512, 1024, 2048, 8192, 32768])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_streaming_kernels_fill_the_chip(rows, in_features, out_features, rank, adapter, monkeypatch):
    streaming = []

    def watch(plan, *args):
        if plan.kernel in STREAMING:
            streaming.append(plan)

    monkeypatch.setattr(launch, "launch", watch)

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, weight = meta(rows, in_features), meta(rows, out_features), meta(out_features, in_features)
    lora_A, lora_B = meta(rank, in_features, dtype=adapter), meta(out_features, rank, dtype=adapter)
    S, seed = meta(rows, rank, dtype=torch.float32), meta(1, dtype=torch.int64)
    for target in TARGETS.values():
        for form in ("fused", "addmm"):
            streaming.clear()
            options = {"choice": form, "target": target}
            steps.forward(x, weight, lora_A, lora_B, None, seed, 1.0, 0.1, **options)
            steps.backward(dy, x, weight, lora_A, lora_B, S, seed, 1.0, 0.1, adapter, **options)
            assert len(streaming) == (3 if rank <= MAX_RANK else 4)
            for plan in streaming:
                programs, mebibytes = math.prod(plan.grid), math.prod(plan.sizes[:2]) * 2 / 2**20
                if mebibytes >= FILLED_FROM[rank]:
                    assert programs >= 0.75 * target.sms, plan
                if mebibytes >= LARGE:
                    assert programs >= 0.75 * math.ceil(programs / target.sms) * target.sms, plan
