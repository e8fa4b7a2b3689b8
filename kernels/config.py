"""Tile shapes: which are valid on a target, and which one a shape gets.  The target is an argument; no GPU is asked."""

import functools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import torch

from fastlora.kernels.target import TENSOR_MEMORY_COLUMNS, Target


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉.  Triton's own takes 1.4 µs on the host (timeit), and forward and backward make thirty."""
    return -(-a // b)


@functools.cache
def rank_block(r: int, limit: int = 128) -> int:
    """The padded rank of one dot: a power of two, at least 16 (tl.dot's minimum), at most `limit`.  Larger ranks loop."""
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

    def __str__(self) -> str:
        """The fields in order, "128,256,64,32,8,3,8": the tile's name in choices and in the tuner's file."""
        return ",".join(map(str, astuple(self)))

    def shared_memory(self, itemsize: int, descriptors: bool) -> int:
        """Bytes of the operand pipeline, of V's tile and, with descriptors, of the C tile staged for the store."""
        pipeline = self.num_stages * (self.block_m + self.block_n) * self.block_k
        staged = self.block_m * self.block_n if descriptors else 0
        return (pipeline + self.block_r * self.block_n + staged) * itemsize + 1024

    def is_valid(self, target: Target, dtype: torch.dtype, precision: str, descriptors: bool) -> bool:
        """The one statement of what may run, for the default choice and for the tuner."""
        accumulators = self.block_m * self.block_n // (target.warp_size * self.num_warps)  # a thread's
        if dtype == torch.float32 and precision == "ieee":
            # Without tensor cores a thread holds its rows and columns of both operands.  With 32 accumulators and steps of 16
            # that is 228 registers on sm_90; steps of 32 spill.
            fits = accumulators <= 32 and max(self.block_k, self.block_r) <= 16
        else:
            # 128 accumulators leave room for wgmma's operands, which are in shared memory.  They leave no room for mma's,
            # which are in registers, nor for the addresses of pointer loads (632 bytes of stack with ragged rows).
            roomy = target.has_wgmma and descriptors
            # One wgmma covers 64 rows.
            fits = accumulators <= (128 if roomy else 64) and (self.block_m >= 64 or not target.has_wgmma)
        if target.has_tensor_memory:
            # U's tile, and two accumulators where nothing passes the rank-r product through registers: 128 x 256 takes 576
            # columns at rank 16 without bias and mask (Triton 3.8 and 3.9, compiled).
            fits = fits and 2 * self.block_n + self.block_r <= TENSOR_MEMORY_COLUMNS
        return fits and self.shared_memory(dtype.itemsize, descriptors) <= target.shared_memory


def gemm_candidates(dtype: torch.dtype, precision: str) -> Iterator[GemmConfig]:
    """Tiles worth trying.  The largest, which re-reads its operands least, comes first."""
    if dtype == torch.float32 and precision == "ieee":
        for block_m, block_n, warps in ((128, 64, 8), (64, 64, 8), (32, 64, 4)):
            yield GemmConfig(block_m, block_n, 16, 16, warps, 2)
        return
    depth = 128 // dtype.itemsize  # 128 bytes: one swizzle atom of a descriptor
    for block_m, block_n, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (32, 64, 4)):
        for block_k in (depth, depth // 2):
            for stages in (4, 3):
                yield GemmConfig(block_m, block_n, block_k, 32, warps, stages)


def valid_tiles(dtype: torch.dtype, precision: str, target: Target, descriptors: bool) -> list[GemmConfig]:
    """The candidates that may run."""
    return [config for config in gemm_candidates(dtype, precision) if config.is_valid(target, dtype, precision, descriptors)]


#: Of tiles (block_m, block_n): clocks of the tensor cores over clocks of shared memory, at most 1.  On Hopper 16 columns of P
#: and rows of Q take block_m · block_n / 128 clocks to multiply.  At 128 bytes a clock they take (block_m + block_n) / 4 to
#: write, and every 64 rows of the tile take (64 + block_n) / 4 to read.  This is arithmetic; nothing was measured.  The last
#: tile, and (128, 64), are for mma and float32: they load as many bytes for a product as their ratio to the others says.
TILE_EFFICIENCY = {(128, 256): 1.0, (128, 128): 0.8, (128, 64): 0.67, (64, 128): 0.67, (64, 64): 0.5, (32, 64): 0.33}


@functools.lru_cache(maxsize=4096)
def gemm_config(rows: int, cols: int, dtype: torch.dtype, precision: str, target: Target, descriptors: bool) -> GemmConfig:
    """The valid tile that takes least time: a wave of tiles, full or not, takes block_m · block_n / efficiency."""

    def time(config: GemmConfig) -> float:
        tile = config.block_m, config.block_n
        waves = cdiv(cdiv(rows, tile[0]) * cdiv(cols, tile[1]), target.sms)
        return waves * tile[0] * tile[1] / TILE_EFFICIENCY[tile]

    return min(valid_tiles(dtype, precision, target, descriptors), key=time)


def lora_tile_config(dtype: torch.dtype, precision: str) -> GemmConfig:
    """The tile of a GEMM launch without P and Q.  It is small: that launch waits for the store of C."""
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
    masks: int = 1  # how many operands of block_r ranks

    def shared_memory(self, itemsize: int, small_itemsize: int) -> int:
        """An upper bound in bytes: the pipeline of all operands, and the masked tile on its way to the dot."""
        tile = self.block_m * self.block_k * itemsize
        small = max(self.block_m, self.block_k) * self.block_r * self.masks * small_itemsize
        return self.num_stages * (tile + small) + tile + 1024

    def programs_per_sm(self, target: Target, itemsize: int, small_itemsize: int) -> int:
        """How many of its programs fit on a multiprocessor, counted up to two: two keep loads in flight."""
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
    with_dx: bool = False,
    masks: int = 1,
) -> StreamConfig:
    """The tile that streams a (rows, columns) matrix in `dtype` against an operand of rank r in `small_dtype` (A, B, S, dS).

    The default tile holds 16 KiB of the matrix, with three in flight where they fit.  It has half the rows where full tiles
    make too few programs for the chip.

    Args:
        aligned: rows start at multiples of 16 bytes.  Others load element by element, and more warps share the addresses.
        dropout: Philox's words take registers.  Without tensor cores, or wgmma, a float32 tile has half the height.
        with_dx: the kernel also writes a product U V.  Its accumulator takes half the width.  V stays in registers and takes
            half the height where it is large, where addresses are many, or where dots use no tensor core.
        masks: projections that share the pass, each with an operand of rank r and an accumulator.
    """
    # mma keeps the operands of every projection in registers: 64 ranks of three spill 16 bytes (sm_80, Triton 3.7.1).
    # With ragged rows their addresses take as many: there even wgmma spills 2472 bytes.
    block_r = rank_block(r, 128 if masks == 1 else 64 if target.has_wgmma and aligned else 32)
    # A float32 operand beside a 16-bit tile becomes two 16-bit ones.  From rank 64 on they need a narrower tile not to spill.
    # mma keeps its operands in registers: it needs that from rank 32 on, and a shorter tile (sm_80 and sm_86, Triton 3.7.1).
    mixed = small_dtype.itemsize > dtype.itemsize
    hi_lo = mixed and block_r >= (64 if target.has_wgmma else 32)
    many_warps = block_r * masks >= 64 or not aligned or (masks > 1 and (with_dx or mixed or dtype.itemsize == 4))
    many_warps = many_warps or ((mixed or dtype.itemsize == 4) and target.has_tensor_memory)
    block_m, warps = 64, 8 if many_warps else 4
    if hi_lo and not target.has_wgmma:
        block_m, warps = 32, 4 if aligned and not with_dx else 8
    if with_dx and (block_r * masks >= 64 or not aligned or dtype.itemsize == 4):
        block_m = 32
    if dropout and dtype.itemsize == 4 and (block_r >= 64 or not target.has_wgmma):
        block_m = 32  # dots without wgmma keep all operands in registers, beside Philox's words: 64 rows spill 8 bytes on sm_80
    if masks > 1 and (dtype.itemsize == 4 or not aligned or (with_dx and dtype == torch.float16)):
        block_m = 32  # at 64 rows three masks spill: float32 848 bytes, ragged rows 24, float16 8 (sm_90, Triton 3.7.1)
    narrow = hi_lo or with_dx or dtype.itemsize == 4 or (masks > 1 and (not aligned or (mixed and not target.has_wgmma)))
    widths = (64,) if narrow else (128, 64)
    if hi_lo and with_dx and block_r == 64 and not target.has_wgmma:
        widths = (32,)  # 64 columns spill 216 bytes in bfloat16 (sm_80, Triton 3.7.1)
    candidates = [StreamConfig(block_m, width, block_r, warps, stages, masks) for width in widths for stages in (3, 2)]
    fitting = (
        config for config in candidates if config.shared_memory(dtype.itemsize, small_dtype.itemsize) <= target.shared_memory
    )
    config = next(fitting, StreamConfig(block_m, 64, block_r, warps, 1, masks))
    tiles = cdiv(shape[0], config.block_m) * cdiv(shape[1], config.block_k) * cdiv(r, block_r)
    if config.block_m == 64 and not fills_device(tiles, target):
        return replace(config, block_m=32, num_warps=4)
    return config


def super_tile_config(
    shape: tuple[int, int], r: int, dtype: torch.dtype, small_dtype: torch.dtype, target: Target
) -> StreamConfig:
    """The tile for dS and dB in one pass over dY, (rows, columns).

    It is wide: each block of columns writes a partial dS, (M, r) float32, that is read again.  At 512 columns of a 16-bit dY
    and rank 16 a partial dS is an eighth of dY's bytes.  It is narrower where wide tiles make too few programs.
    """
    block_r = rank_block(r)
    block_m, width = (64, 128) if dtype.itemsize == 4 else (32, 512)
    width = width * 16 // block_r
    mixed = small_dtype.itemsize > dtype.itemsize
    if mixed and not target.runs_ptx:
        width //= 4  # MFMA: at 256 columns float16 and float32 at rank 16 spill 140 bytes (gfx942, Triton 3.7.1)
    on_wgmma = target.has_wgmma and not target.has_tensor_memory
    wide_tiles_fill = fills_device(cdiv(shape[0], 64) * cdiv(shape[1], 256), target)
    if mixed and on_wgmma and wide_tiles_fill:
        # At 32 rows the two dots with B are one chain of 64 mma (sm_90, from the machine code); at 64 rows they are wgmma.
        block_m, width = 64, 256
    narrowest = 16 * block_r // dtype.itemsize  # there a partial dS is a quarter of dY's bytes
    while width > narrowest and not fills_device(cdiv(shape[0], block_m) * cdiv(shape[1], width), target):
        width //= 2
    candidates = [StreamConfig(block_m, columns, block_r, 8, stages) for columns in (width, width // 2) for stages in (3, 2)]
    for config in candidates:
        pipeline = config.num_stages * block_m * (config.block_k * dtype.itemsize + block_r * 4)
        hi_and_lo_of_b = 2 * config.block_k * block_r * dtype.itemsize
        if pipeline + hi_and_lo_of_b <= target.shared_memory:
            return config
    return StreamConfig(block_m, width // 2, block_r, 8, 1)


MIN_STEPS = 2  # of one split of a reduction, so that its loads overlap
MAX_WAVES = 4  # of programs: with four, a last wave that is not full costs little


def fills_device(tiles: int, target: Target) -> bool:
    """Whether a reduction over so many tiles can be split into a part for every multiprocessor."""
    return tiles >= MIN_STEPS * target.sms


def split_steps(steps: int, programs: int, target: Target, partial: float, programs_per_sm: int = 2) -> tuple[int, int]:
    """(splits, steps_per_split): how to split-K a reduction of `steps` steps that `programs` programs make.

    The split minimises the steps of the busiest multiprocessor, which runs `programs_per_sm` programs at a time, plus the
    partial sums.  Each partial sum has `partial` times the bytes of a step, and is written and read again.  A split has at
    least MIN_STEPS steps, and at least the bytes of its partial sum.  There is one split even of no steps.
    """
    most_waves = cdiv(MAX_WAVES * programs_per_sm * target.sms, max(programs, 1))
    most = min(most_waves, steps // max(MIN_STEPS, math.ceil(partial)))
    best, least = (1, steps), math.inf
    for wanted in range(1, most + 1):
        steps_per_split = cdiv(steps, wanted)
        splits = cdiv(steps, steps_per_split)
        busiest = max(programs_per_sm, cdiv(programs * splits, target.sms))
        sums = 2 * partial * splits * programs / target.sms if splits > 1 else 0.0
        # Require a 5 % gain: every extra split adds a partial sum to write and reread.
        if busiest * steps_per_split + sums < 0.95 * least:
            best, least = (splits, steps_per_split), busiest * steps_per_split + sums
    return best
