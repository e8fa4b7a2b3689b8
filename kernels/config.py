"""Tile shapes: what may run on a target, and which of it is chosen for a shape.  No GPU is asked; the target is an argument."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastlora.kernels.target import Target


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉.  Triton's own takes 1.4 µs on the host (timeit), and forward and backward make thirty."""
    return -(-a // b)


@functools.cache
def rank_block(r: int, limit: int = 128) -> int:
    """The padded rank of one dot: at least 16 (tl.dot's minimum), a power of two, at most `limit`; larger ranks loop."""
    return min(limit, max(16, 1 << (r - 1).bit_length()))


@dataclass(frozen=True)
class GemmConfig:
    """The tile and pipeline of the GEMM kernel: C tile (block_m, block_n), reduction step block_k, rank step block_r."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    store_parts: int = 1  # blocks of columns in which a descriptor stores the tile: smaller ones leave room for a stage

    def shared_memory(self, itemsize: int, descriptors: bool) -> int:
        """Bytes of the operand pipeline, of V's tile and, with descriptors, of the tile that is staged for the store."""
        pipeline = self.num_stages * (self.block_m + self.block_n) * self.block_k
        staged = self.block_m * self.block_n // self.store_parts if descriptors else 0
        return (pipeline + self.block_r * self.block_n + staged) * itemsize + 1024

    def is_valid(self, target: Target, dtype: torch.dtype, precision: str, descriptors: bool) -> bool:
        """The one statement of what may run: for the choice below and for a tuner."""
        accumulators = self.block_m * self.block_n // (32 * self.num_warps)
        if dtype == torch.float32 and precision == "ieee":
            # Without tensor cores a thread holds its rows and columns of both operands: at 32 accumulators and steps of 16
            # that is 228 registers on sm_90, at steps of 32 it spills.
            fits = accumulators <= 32 and max(self.block_k, self.block_r) <= 16
        else:
            # 128 leave room for wgmma's operands, which are in shared memory, but not for mma's, which are in registers, nor
            # for float16 on sm_100, whose accumulators leave tensor memory to be scaled (136 bytes of stack at rank 64).
            # Without descriptors the addresses take them (632 bytes of stack where rows are not aligned).
            scaled = dtype == torch.float16 and target.has_tensor_memory
            roomy = target.has_wgmma and descriptors and not scaled
            # One wide instruction covers 64 rows.
            fits = accumulators <= (128 if roomy else 64) and (self.block_m >= 64 or not target.has_wgmma)
        return fits and self.shared_memory(dtype.itemsize, descriptors) <= target.shared_memory


def gemm_candidates(dtype: torch.dtype, precision: str) -> Iterator[GemmConfig]:
    """Tiles worth trying, the largest, which re-reads its operands least, first."""
    if dtype == torch.float32 and precision == "ieee":
        for block_m, block_n, warps in ((128, 64, 8), (64, 64, 8), (32, 64, 4)):
            yield GemmConfig(block_m, block_n, 16, 16, warps, 2)
        return
    depth = 128 // dtype.itemsize  # 128 bytes: one swizzle atom of a descriptor
    for block_m, block_n, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (32, 64, 4)):
        for block_k in (depth, depth // 2):
            for stages in (4, 3):
                yield GemmConfig(block_m, block_n, block_k, 32, warps, stages)
    # A fourth stage of the largest tile, at the price of a store in four parts: for a tuner to weigh.
    yield GemmConfig(128, 256, depth, 32, 8, 4, store_parts=4)


@functools.lru_cache(maxsize=4096)
def gemm_config(rows: int, cols: int, dtype: torch.dtype, precision: str, target: Target, descriptors: bool) -> GemmConfig:
    """The largest valid tile that still gives every multiprocessor one; else the smallest, which spreads the work furthest."""
    valid = [config for config in gemm_candidates(dtype, precision) if config.is_valid(target, dtype, precision, descriptors)]
    for config in valid:
        if cdiv(rows, config.block_m) * cdiv(cols, config.block_n) >= target.sms:
            return config
    smallest = min(config.block_m * config.block_n for config in valid)
    return next(config for config in valid if config.block_m * config.block_n == smallest)


def addmm_config(dtype: torch.dtype, precision: str) -> GemmConfig:
    """The tile that is written without a product: small, since what it waits for is the store of C."""
    if dtype == torch.float32 and precision == "ieee":
        return GemmConfig(64, 64, 16, 16, 8, 1)
    return GemmConfig(64, 128 if dtype.itemsize == 2 else 64, 16, 32, 4, 1)


@dataclass(frozen=True)
class StreamConfig:
    """The tile of a kernel that streams x or dY once: block_m rows of block_k columns a step, against block_r ranks."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int

    def shared_memory(self, itemsize: int, small_itemsize: int) -> int:
        """At most the bytes of the pipeline of both operands and of the masked tile that goes back for the dot."""
        tile = self.block_m * self.block_k * itemsize
        small = max(self.block_m, self.block_k) * self.block_r * small_itemsize
        return self.num_stages * (tile + small) + tile + 1024

    def beside(self, target: Target, itemsize: int, small_itemsize: int) -> int:
        """How many of its programs a multiprocessor surely has room for, up to two, which keep loads in flight together."""
        return max(1, min(2, target.shared_memory // self.shared_memory(itemsize, small_itemsize)))


def stream_config(
    shape: tuple[int, int],
    r: int,
    dtype: torch.dtype,
    small_dtype: torch.dtype,
    target: Target,
    *,
    aligned: bool = True,
    dropout: bool = False,
    term: bool = False,
) -> StreamConfig:
    """Tiles of 16 KiB of x or dY, (rows, columns) in `dtype`, three in flight where they fit; of half the rows where that takes
    too few programs.  The operand of rank r, in `small_dtype`, is A, B, S or dS.

    Rows that are not `aligned` to 16 bytes are loaded element by element, and their addresses spread over more warps.  With
    `dropout` Philox is most of the work, and waits for itself: eight warps where their registers leave room for two programs,
    which they do not where mma keeps its operands there.  With `term` a product U V is written on the way: its accumulator
    takes half the width, and V, which stays in registers, half the height where it is large, addresses are many or dots take
    no mma.
    """
    block_r = rank_block(r)
    # A float32 operand beside a 16-bit tile is split into two more; of 64 ranks or more they need a narrower tile not to spill,
    # and where mma keeps its operands in registers a shorter one as well.
    mixed = small_dtype.itemsize > dtype.itemsize
    split = mixed and block_r >= 64
    many_warps = block_r >= 64 or (mixed and target.has_tensor_memory) or not aligned or (dropout and target.has_wgmma)
    block_m, warps = 64, 8 if many_warps else 4
    if split and not target.has_wgmma:
        block_m, warps = 32, 4 if aligned else 8
    if term and (block_r >= 64 or not aligned or dtype.itemsize == 4):
        block_m = 32
    if dropout and block_r >= 64 and dtype.itemsize == 4:
        block_m = 32  # dots without mma keep all of their operands in registers, beside Philox's words
    widths = (64,) if split or term or dtype.itemsize == 4 else (128, 64)
    candidates = [StreamConfig(block_m, width, block_r, warps, stages) for width in widths for stages in (3, 2)]
    fitting = (
        config for config in candidates if config.shared_memory(dtype.itemsize, small_dtype.itemsize) <= target.shared_memory
    )
    config = next(fitting, StreamConfig(block_m, 64, block_r, warps, 1))
    tiles = cdiv(shape[0], config.block_m) * cdiv(shape[1], config.block_k) * cdiv(r, block_r)
    if config.block_m == 64 and not fills_device(tiles, target):
        return replace(config, block_m=32, num_warps=4)
    return config


def super_tile_config(
    shape: tuple[int, int], r: int, dtype: torch.dtype, small_dtype: torch.dtype, target: Target
) -> StreamConfig:
    """The tile for dS and dB in one pass over dY, (rows, columns): wide, because each block of columns writes a partial dS,
    (M, r) float32, that is read again: at 512 columns of a 16-bit dY and rank 16, an eighth of dY's bytes.  Narrower where wide
    ones take too few programs."""
    block_r = rank_block(r)
    block_m, width = (64, 128) if dtype.itemsize == 4 else (32, 512)
    width = width * 16 // block_r
    on_wgmma = target.has_wgmma and not target.has_tensor_memory
    if small_dtype.itemsize > dtype.itemsize and on_wgmma and fills_device(cdiv(shape[0], 64) * cdiv(shape[1], 256), target):
        # B's two dots are one chain of 64 mma at 32 rows (sm_90, read from the machine code); at 64 rows they are wgmma.
        block_m, width = 64, 256
    narrowest = 16 * block_r // dtype.itemsize  # there a partial dS is a quarter of dY's bytes
    while width > narrowest and not fills_device(cdiv(shape[0], block_m) * cdiv(shape[1], width), target):
        width //= 2
    candidates = [StreamConfig(block_m, columns, block_r, 8, stages) for columns in (width, width // 2) for stages in (3, 2)]
    for config in candidates:
        pipeline = config.num_stages * block_m * (config.block_k * dtype.itemsize + block_r * 4)
        split_b = 2 * config.block_k * block_r * dtype.itemsize
        if pipeline + split_b <= target.shared_memory:
            return config
    return StreamConfig(block_m, width // 2, block_r, 8, 1)


MIN_STEPS = 2  # of a part of a split reduction, so that loads overlap
MAX_WAVES = 4  # of programs beside each other: enough for the last round, which is not full, to be short


def fills_device(tiles: int, target: Target) -> bool:
    """Whether a reduction of so many tiles can be cut into a part for every multiprocessor."""
    return tiles >= MIN_STEPS * target.sms


def split_steps(steps: int, programs: int, target: Target, partial: float, beside: int = 2) -> tuple[int, int]:
    """(parts, steps of each) of the reductions of `steps` steps that `programs` programs make, cut into the parts that take
    least time: the steps of the multiprocessor with the most programs, `beside` of them at a time, and the partial sums, each
    `partial` times a step's bytes, which are written and read again.

    But into no part of fewer than MIN_STEPS, nor of fewer bytes than its partial sum; there is one part even of no steps.
    """
    most = min(cdiv(MAX_WAVES * beside * target.sms, max(programs, 1)), steps // max(MIN_STEPS, math.ceil(partial)))
    best, least = (1, steps), math.inf
    for wanted in range(1, most + 1):
        each = cdiv(steps, wanted)
        parts = cdiv(steps, each)
        fullest = max(beside, cdiv(programs * parts, target.sms))
        sums = 2 * partial * parts * programs / target.sms if parts > 1 else 0.0
        if fullest * each + sums < 0.95 * least:  # a part more for nothing is a partial sum more
            best, least = (parts, each), fullest * each + sums
    return best
