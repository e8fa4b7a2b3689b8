"""Which form runs a step on this GPU: what `fastlora tune` measured, else what arithmetic says.

    "fused"           one Triton GEMM that starts from the LoRA term
    "fused/<tile>"    the same with a tile that was measured, see `fastlora.kernels.config.GemmConfig`
    "addmm"           a kernel writes the LoRA term, then cuBLAS accumulates onto it in place
    "torch"           matrix products of torch alone, without a mask: few launches, for decoding

Such a string is a choice.  It is the operators' `backend` argument, and stands in the tuner's file and tables.

Over a frozen GEMM with a reduction of length L, "fused" adds r / L for its LoRA term and whatever Triton's GEMM is slower than
cuBLAS.  "addmm" adds balance / L to write the term, which cuBLAS reads back in its epilogue.  So use "fused" when Triton is
slower than cuBLAS by less than (balance − r) / L: 3.6 % on 9.0 at L = 4096, r = 16.

Each environment has a file of measured choices: GPU (name, capability, multiprocessors), torch, Triton, fastlora.  A file that
is damaged or of another environment is ignored with a warning.  The folder is $FASTLORA_CACHE_DIR, else
$XDG_CACHE_HOME/fastlora, else ~/.cache/fastlora.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fastlora import atomic, torch_backend
from fastlora._version import __version__
from fastlora.kernels import steps
from fastlora.kernels.config import cdiv, valid_tiles
from fastlora.kernels.target import Target
from fastlora.kernels.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Expected:
    """What is taken of a GPU until `fastlora tune` has measured it.

    balance: multiply-adds of 16-bit operands in the time that memory takes for 2 bytes, from measured ceilings.
    slowdown: reduction length up to which it holds -> how much slower than cuBLAS Triton's GEMM is.  The last one has no end.
    """

    balance: int
    slowdown: dict[int, float]

    def prefers_fused(self, length: int, r: int) -> bool:
        """Whether "fused" is expected to take less time than "addmm"."""
        listed = next((longest for longest in self.slowdown if length <= longest), max(self.slowdown))
        return self.slowdown[listed] * length <= self.balance - r


#: By the lowest capability that an entry holds for.
EXPECTED = {
    # An A100's ceilings, about 250 TFLOP/s and 1.56 TB/s.  The slowdown is assumed: nothing is published for this kernel.
    80: Expected(160, {4096: 0.1}),
    # An H200's ceilings; an H100's give 215.  Slowdowns of the Gluon tutorial on persistence, M = N = 8192, 128 x 256 x 64,
    # persistent against cuBLAS in TFLOP/s: 485 to 588, 575 to 588, 595 to 616, 630 to 646, 646 to 661.
    90: Expected(165, {512: 0.212, 1024: 0.023, 2048: 0.035, 4096: 0.025, 8192: 0.023}),
    # A B200's datasheet: 72 % of 2250 TFLOP/s over 90 % of 8 TB/s.  Without warp specialisation Triton is 20 to 30 % behind
    # (the same tutorial).
    100: Expected(225, {4096: 0.25}),
}


def expected(target: Target) -> Expected:
    """The entry of the highest capability at or below the target's."""
    return EXPECTED[max((known for known in EXPECTED if known <= target.capability), default=min(EXPECTED))]


@dataclass(frozen=True)
class Problem:
    """What a choice depends on besides the GPU."""

    direction: str  # "forward" or "backward"
    dtype: torch.dtype  # of x, W and dy
    rows: int  # of x, as the next power of two
    in_features: int
    out_features: int
    r: int
    dropout: bool
    precision: str = "ieee"  # how float32 dots multiply, see `matmul_precision`

    def __str__(self) -> str:
        """The problem in a line, which is its key in the file: "forward bfloat16 8192 x 4096 -> 4096 r=16 with dropout"."""
        dtype = "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        dropout = " with dropout" if self.dropout else ""
        return f"{self.direction} {dtype} {self.rows} x {self.in_features} -> {self.out_features} r={self.r}{dropout}"

    @property
    def length(self) -> int:
        """Of the GEMM's reduction."""
        return self.in_features if self.direction == "forward" else self.out_features

    @property
    def width(self) -> int:
        """Of the GEMM's result."""
        return self.out_features if self.direction == "forward" else self.in_features


def next_power_of_2(rows: int) -> int:
    """The power of two at or above `rows`."""
    return 1 << max(rows - 1, 0).bit_length()


def default_choice(problem: Problem, target: Target) -> str:
    """The choice by arithmetic."""
    if problem.direction == "forward" and not problem.dropout and problem.rows <= torch_backend.DECODE_ROWS:
        return "torch"
    # cuBLAS is furthest ahead in float32 without tensor cores, and where tiles are too few for the chip.
    fills_chip = cdiv(problem.rows, 128) * cdiv(problem.width, 256) >= target.sms
    within_reach = expected(target).prefers_fused(problem.length, problem.r)
    return "fused" if problem.dtype.itemsize == 2 and fills_chip and within_reach else "addmm"


def candidates(problem: Problem, target: Target) -> list[str]:
    """Every choice for a problem whose tensors are contiguous, the default first.  Default tiles have a name too."""
    widths = problem.in_features, problem.out_features
    descriptors = target.has_descriptors and all(width * problem.dtype.itemsize % 16 == 0 for width in widths)
    tiles = [f"fused/{tile}" for tile in valid_tiles(problem.dtype, problem.precision, target, descriptors)]
    torch_alone = [] if problem.dropout else ["torch"]
    return list(dict.fromkeys([default_choice(problem, target), *steps.FORMS, *torch_alone, *tiles]))


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, target: Target) -> str:
    """The choice of one step: the measured one, else the default."""
    choice, default = _measured(target).get(str(problem)), default_choice(problem, target)
    if choice is None or choice in candidates(problem, target):
        return choice or default
    warnings.warn(f"{choice!r} in {path_of(target)} is ignored: {problem} cannot take it", stacklevel=2)
    return default


@functools.lru_cache(maxsize=4096)
def plan_forward(choice: str, target: Target, precision: str, mask: str, *specs: Any) -> Callable[..., Any]:
    """`steps.plan_forward`, which also takes the choices "triton", for the one that suits the shape, and "torch"."""
    if choice == "triton":
        choice = _choose("forward", target, precision, bool(mask), *specs[:3])
    return torch_backend.forward if choice == "torch" else steps.plan_forward(choice, target, precision, mask, *specs)


@functools.lru_cache(maxsize=4096)
def plan_backward(
    choice: str, target: Target, precision: str, mask: str, adapter_dtype: torch.dtype, *specs: Any
) -> Callable[..., Any]:
    """`steps.plan_backward`, which also takes "triton" and "torch".  Without dx there is no GEMM to choose for."""
    dy, _, weight, lora_A, *_ = specs
    if choice == "triton" and weight is not None and lora_A is not None:
        choice = _choose("backward", target, precision, bool(mask), dy, weight, lora_A)
    if choice == "torch":
        return torch_backend.backward
    choice = "addmm" if choice == "triton" else choice
    return steps.plan_backward(choice, target, precision, mask, adapter_dtype, *specs)


@functools.lru_cache(maxsize=4096)
def plan_y(choice: str, target: Target, precision: str, mask: str, *specs: Any) -> Callable[..., Any]:
    """`steps.plan_y` for a projection of several, which also takes "triton".  Its S is made by kernels also for "torch"."""
    x, weight, lora_B, _ = specs
    if choice == "triton":
        choice = _choose("forward", target, precision, bool(mask), x, weight, lora_B.t())
    return steps.plan_y("addmm" if choice == "torch" else choice, target, precision, mask, *specs)


def _choose(
    direction: str, target: Target, precision: str, dropout: bool, rows: TensorSpec, weight: TensorSpec, lora_A: TensorSpec
) -> str:
    N, K = weight.shape
    shape = next_power_of_2(rows.shape[0]), K, N, lora_A.shape[0]
    return choose(Problem(direction, rows.dtype, *shape, dropout, precision), target)


def store(target: Target, results: Mapping[Problem, str]) -> Path:
    """Add measured choices to the target's file, which is returned.  They hold from now on.

    The file is replaced at once, under a lock, with what it held before, so that two processes keep both their results.

    Raises:
        ValueError: a target without a name, or a choice that its problem cannot take.
        OSError: the folder or the file cannot be written; the file is as it was.
    """
    if not target.name:
        raise ValueError("target.name is empty: measured choices are stored under the name of a GPU")
    for problem, choice in results.items():
        if choice not in candidates(problem, target):
            raise ValueError(f"{problem} cannot take the choice {choice!r}")
    path = path_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        choices = stored(target) | {str(problem): choice for problem, choice in results.items()}
        content = json.dumps({"environment": environment(target), "choices": choices}, indent=1) + "\n"
        atomic.write(path, content.encode(), locked=True)
    forget()
    return path


def forget() -> None:
    """Read the target's file anew and plan anew: the choices may have changed."""
    for cached in (_measured, choose, plan_forward, plan_backward, plan_y):
        cached.cache_clear()


@functools.cache
def _measured(target: Target) -> dict[str, str]:
    return stored(target) if target.name else {}


def stored(target: Target) -> dict[str, str]:
    """The choices in the target's file, by `str(problem)`.  Warns and returns nothing where the file cannot be believed."""
    path: Path | str = "the cache of measured choices"
    try:
        path = path_of(target)
        data = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("choices"), dict):
            raise ValueError("it holds no choices")
        if (found := data.get("environment")) != (here := environment(target)):
            raise ValueError(f"it is for {found}, and this is {here}")
        return data["choices"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or lists nested too deep
        warnings.warn(f"{path} is ignored: {error}; `fastlora tune` writes it anew", stacklevel=2)
        return {}


def fingerprint(target: Target) -> str | None:
    """A hash of the target's file, to tell times before a tune from those after it.  None without a file."""
    try:
        return hashlib.sha256(path_of(target).read_bytes()).hexdigest()[:10]
    except (OSError, RuntimeError):
        return None


def environment(target: Target) -> dict[str, Any]:
    """What a measured choice holds for."""
    gpu = {"gpu": target.name, "capability": target.capability, "multiprocessors": target.sms}
    return {"format": 1, **gpu, "torch": torch.__version__, "triton": triton.__version__, "fastlora": __version__}


def path_of(target: Target) -> Path:
    """The file of the target's environment.  Raises RuntimeError where there is no home folder to put it in."""
    facts = environment(target)
    words = [target.name, *(f"{name} {facts[name]}" for name in ("torch", "triton", "fastlora"))]
    readable = "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words)[:150]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    if own := os.environ.get("FASTLORA_CACHE_DIR"):
        folder = Path(own)
    else:
        shared = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(shared) if shared else Path.home() / ".cache") / "fastlora"
    return folder / f"{readable}-{digest}.json"
