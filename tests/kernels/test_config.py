"""config.py: every shape has a valid tile on every target, splits cover a reduction, streaming kernels fill the chip."""

import math

import pytest
import torch

from fastlora.kernels.config import (
    MIN_STEPS,
    TILE_EFFICIENCY,
    GemmConfig,
    gemm_candidates,
    gemm_config,
    rank_block,
    split_steps,
    valid_tiles,
)
from fastlora.kernels.grad_a import plan_grad_a
from fastlora.kernels.grad_b import MAX_RANK, plan_grad_s_and_b
from fastlora.kernels.launch import Plan
from fastlora.kernels.shrink import plan_shrink
from fastlora.kernels.target import NOT_NVIDIA, Target
from fastlora.kernels.tensor_spec import TensorSpec

TARGETS = {
    "sm_80": Target(80, 108, 166912),
    "sm_86": Target(86, 84, 101376),
    "sm_90": Target(90, 132, 232448),
    "sm_100": Target(100, 148, 232448),
    "small and unknown": Target(121, 20, 101376),
}
MI300X = Target(NOT_NVIDIA, 304, 65536, warp_size=64)
HOPPER = TARGETS["sm_90"]
DTYPES = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


@pytest.mark.parametrize("target", [*TARGETS.values(), MI300X], ids=lambda target: f"sm_{target.capability}")
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_shape_has_a_valid_tile(target, dtype, precision, descriptors):
    facts = dtype, precision, target, descriptors
    valid = valid_tiles(*facts)
    assert set(valid) <= set(gemm_candidates(dtype, precision))
    assert all(config.is_valid(target, dtype, precision, descriptors) for config in valid)
    for rows, cols in ((1, 1), (1, 4096), (64, 4096), (512, 1024), (8192, 4096), (16384, 28672)):
        assert gemm_config(rows, cols, *facts) in valid


def test_large_shapes_get_large_tiles():
    assert str(gemm_config(8192, 4096, torch.bfloat16, "ieee", HOPPER, True)) == "128,256,64,32,8,3,8"
    config = gemm_config(8192, 4096, torch.bfloat16, "ieee", TARGETS["sm_80"], False)
    assert (config.block_m, config.block_n) == (128, 128)
    few = gemm_config(32, 4096, torch.bfloat16, "ieee", HOPPER, True)
    assert few.block_m * few.block_n < 128 * 128


@pytest.mark.parametrize(("rows", "cols"), [(2048, 4096), (4096, 4096), (8192, 1024), (8192, 14336), (16384, 5120)])
def test_standard_shapes_keep_the_largest_tile(rows, cols):
    config = gemm_config(rows, cols, torch.bfloat16, "ieee", HOPPER, True)
    assert (config.block_m, config.block_n) == (128, 256)


@pytest.mark.parametrize(
    ("rows", "cols", "tile"),
    [(1024, 5120, (64, 128)), (2048, 1024, (128, 128)), (1, 4096, (64, 64)), (8448, 4096, (128, 256))],
)
def test_the_last_wave_counts(rows, cols, tile):
    """At 1024 x 5120, 160 tiles of 128 x 256 fill two waves of 132 to 61 %, and 640 of 64 x 128 fill five to 97 %."""
    config = gemm_config(rows, cols, torch.bfloat16, "ieee", HOPPER, True)
    assert (config.block_m, config.block_n) == tile


def test_every_candidate_has_an_efficiency():
    """It follows from the clocks of Hopper's shared memory: 128 bytes, beside 2048 multiply-adds of the tensor cores."""
    for dtype, precision in DTYPES:
        assert {(config.block_m, config.block_n) for config in gemm_candidates(dtype, precision)} <= set(TILE_EFFICIENCY)
    for m, n in ((128, 256), (128, 128), (64, 128), (64, 64)):
        bytes_moved = 32 * (m + n) + m // 64 * 32 * (64 + n)
        assert TILE_EFFICIENCY[m, n] == pytest.approx((m * n * 16 / 2048) / (bytes_moved / 128), abs=0.005)


def test_oversized_tiles_are_invalid():
    spilling, too_deep = GemmConfig(128, 256, 64, 32, 4, 3), GemmConfig(128, 256, 64, 32, 8, 4)
    for config in (spilling, too_deep):
        assert not config.is_valid(HOPPER, torch.bfloat16, "ieee", True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_accumulators_and_u_fit_in_tensor_memory(dtype):
    """128 x 256 wants 576 of 512 columns with Triton 3.8 and 3.9."""
    large, half = GemmConfig(128, 256, 64, 32, 8, 3), GemmConfig(128, 128, 64, 32, 8, 4)
    blackwell = TARGETS["sm_100"], dtype, "ieee", True
    assert large.is_valid(HOPPER, *blackwell[1:])
    assert not large.is_valid(*blackwell)
    assert half.is_valid(*blackwell)


@pytest.mark.parametrize(("rank", "block"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (512, 128)])
def test_rank_block(rank, block):
    assert rank_block(rank) == block


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 64, 1000])
@pytest.mark.parametrize("programs", [0, 1, 5, 128, 10000])
@pytest.mark.parametrize("partial", [0.5, 7.5])
def test_splits_cover_every_step_once(steps, programs, partial):
    parts, each = split_steps(steps, programs, HOPPER, partial)
    assert parts >= 1
    assert (parts - 1) * each < max(steps, 1) <= max(parts * each, 1)
    assert parts == 1 or each >= max(MIN_STEPS, partial)


def streaming(M: int, K: int, N: int, r: int, adapter: torch.dtype, target: Target) -> tuple[Plan, list[Plan], list[Plan]]:
    """(the launch for S, those for dS and dB, those for dA in each form) of bfloat16 x and dy, with dropout."""
    x, dy = TensorSpec.new(M, K, dtype=torch.bfloat16), TensorSpec.new(M, N, dtype=torch.bfloat16)
    A, B = TensorSpec.new(r, K, dtype=adapter), TensorSpec.new(N, r, dtype=adapter)
    U, facts = TensorSpec.new(M, r, dtype=torch.float32), ("ieee", target)
    if r <= MAX_RANK:
        of_dy = [plan_grad_s_and_b(dy, B, U, adapter, *facts)]
    else:
        of_dy = [plan_shrink(dy, B.t(), "", *facts), plan_grad_a(dy, U, adapter, *facts, transposed=True)]
    forms: list[dict] = [{"pack": True}, {"V": A}]
    of_x = [plan_grad_a(x, U, adapter, *facts, mask="integer", **form) for form in forms]
    return plan_shrink(x, A, "integer", *facts), of_dy, of_x


# From so many MiB of x or dy at a rank, every streaming kernel has a program for three of four multiprocessors.  Higher ranks
# need more: a part of a reduction is no smaller than its partial sum, which grows with the rank.
FILLED_FROM = {8: 2, 16: 2, 64: 4, 128: 16}
LARGE = 64  # MiB.  From here, the last round of programs fills three of four multiprocessors as well.


@pytest.mark.parametrize("rank", FILLED_FROM)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_streaming_kernels_fill_the_chip(name, rank, adapter):
    sms = TARGETS[name].sms
    for M in (512, 1024, 2048, 8192, 32768):
        for K, N in ((2048, 2048), (2048, 512), (4096, 1024), (8192, 2048), (4096, 14336), (14336, 4096)):
            to_S, of_dy, of_x = streaming(M, K, N, rank, adapter, TARGETS[name])
            for plan in (to_S, *of_dy, *of_x):
                programs, mebibytes = math.prod(plan.grid), math.prod(plan.sizes[:2]) * 2 / 2**20
                if mebibytes >= FILLED_FROM[rank]:
                    assert programs >= 0.75 * sms, plan
                if mebibytes >= LARGE:
                    assert programs >= 0.75 * math.ceil(programs / sms) * sms, plan


@pytest.mark.parametrize(
    ("M", "K", "rank", "bounds"),
    [
        (8192, 4096, 16, (1 / 16, 1 / 4, 1 / 8)),
        (8192, 4096, 32, (1 / 8, 3 / 4, 1 / 4)),
        (8192, 14336, 16, (1 / 16, 1 / 4, 1 / 16)),
        (32768, 4096, 16, (0, 1 / 4, 1 / 16)),
        (8192, 4096, 64, (1 / 4, 1 / 2, 1 / 4)),
        (2048, 4096, 16, (1 / 8, 5 / 8, 1 / 4)),
        (512, 2048, 128, (2, 4, 2)),
    ],
)
def test_partial_sums_stay_small(M, K, rank, bounds):
    """Bytes of partial sums, written and read again, per byte of x or dy: at most (S, dS and dB, dA), on an H200."""
    to_S, of_dy, of_x = streaming(M, K, K, rank, torch.bfloat16, HOPPER)
    for plans, bound in zip(([to_S], of_dy, of_x[:1]), bounds, strict=True):
        results = [result for plan in plans for result in plan.results if result.parts > 1]
        assert 2 * sum(4 * result.parts * math.prod(result.shape) for result in results) <= bound * M * K * 2
