"""The steps to compile, with operands on the meta device, and the GPUs to compile for."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastlora.kernels import steps
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.dropout import mask_code, pack_bits, plan_pack_bits
from fastlora.kernels.gated import gated, gated_backward, plan_gated, plan_gated_backward
from fastlora.kernels.grad_a import grad_a, plan_grad_a
from fastlora.kernels.launch import Result
from fastlora.kernels.shrink import plan_shrink, shrink
from fastlora.kernels.sums import plan_sum, sum_partials
from fastlora.kernels.target import NOT_NVIDIA, Target
from fastlora.kernels.tensor_spec import TensorSpec
from tools.aot import GFX942

# The kernels of a gated MLP, with the activation whose arithmetic is least and the one whose is most.
GATED = ("silu-forward", "silu-backward", "gelu-forward", "gelu-backward")
# Both directions in both forms of `fastlora.kernels.steps`, the passes over x that three projections share, the packed mask
# alone, and the sum of partial results.
STEPS = ("forward", "backward", "addmm-forward", "addmm-backward", "shared", "mask", "sum", *GATED)
# (dtype of x and W, dtype of A and B).  "ieee" and "tf32" are the settings of torch's switch for float32 products.
DTYPES = {
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32-ieee": (torch.float32, torch.float32),
    "float32-tf32": (torch.float32, torch.float32),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
    "float16+float32": (torch.float16, torch.float32),
}
RANKS = (8, 16, 64, 128)
# An A100, an RTX A6000, an RTX 4090, an H200, a B200, an RTX 5090 and an MI300X.
# shared_memory: the most bytes that one block may use.
TARGETS = {
    80: Target(capability=80, sms=108, shared_memory=163 * 1024),
    86: Target(capability=86, sms=84, shared_memory=99 * 1024),
    89: Target(capability=89, sms=128, shared_memory=99 * 1024),
    90: Target(capability=90, sms=132, shared_memory=227 * 1024),
    100: Target(capability=100, sms=148, shared_memory=227 * 1024),
    120: Target(capability=120, sms=170, shared_memory=99 * 1024),
    GFX942: Target(capability=NOT_NVIDIA, sms=304, shared_memory=64 * 1024, warp_size=64),
}
# (M, in, out).  "ragged" rules out tensor descriptors and vector loads, "eighths" has rows of a multiple of 8 elements and
# not of 16, "wide" needs 64-bit offsets, "short" and "tiny" get smaller tiles.
SHAPES = {
    "aligned": (8192, 4096, 4096),
    "ragged": (8191, 4095, 4093),
    "eighths": (8192, 4104, 4104),
    "wide": (2**20, 4096, 4096),
    "short": (512, 4096, 4096),
    "tiny": (32, 512, 512),
}
DROPOUT = 0.1
# Other versions of Triton compile for 8.0, 9.0 and 10.0 alone.
_PIN = re.search(r"^triton==(\S+)$", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.MULTILINE)
IS_PINNED_TRITON = _PIN is not None and triton.__version__ == _PIN[1]


@dataclass(frozen=True, order=True)
class CompileCase:
    """One step for one dtype, rank, GPU and shape: keys of the tables above, and any rank of at least 1."""

    step: str
    dtype: str
    rank: int
    capability: int
    shape: str = "aligned"

    def __str__(self) -> str:
        gpu = "gfx942" if self.capability == GFX942 else f"sm{self.capability}"
        return f"{self.step}-{self.dtype}-r{self.rank}-{gpu}-{self.shape}"

    @property
    def target(self) -> Target:
        return TARGETS[self.capability]

    def run(self, dropout_p: float) -> None:
        """Run the step on meta tensors.  It computes nothing; `launch` sees its launches."""
        M, K, N = SHAPES[self.shape]
        base, adapter = DTYPES[self.dtype]
        x, weight, bias, dy = _meta(M, K, dtype=base), _meta(N, K, dtype=base), _meta(N, dtype=base), _meta(M, N, dtype=base)
        lora_A, lora_B = _meta(self.rank, K, dtype=adapter), _meta(N, self.rank, dtype=adapter)
        S = _meta(M, self.rank, dtype=torch.float32)
        seed = _meta(1, dtype=torch.int64) if dropout_p > 0 else None
        with _float32_products("tf32" if self.dtype.endswith("tf32") else "ieee"):
            choice = "addmm" if self.step.startswith("addmm") else "fused"
            options: dict[str, Any] = {"choice": choice, "target": self.target}
            if self.step in GATED:
                self._run_gated(x, lora_A, S, seed, dropout_p)
            elif self.step.endswith("forward"):
                steps.forward(x, weight, lora_A, lora_B, bias, seed, 2.0, dropout_p, **options)
            elif self.step.endswith("backward"):
                steps.backward(dy, x, weight, lora_A, lora_B, S, seed, 2.0, dropout_p, adapter, **options)
            elif self.step == "shared":
                self._run_shared(x, seed, dropout_p)
            elif self.step == "sum":
                both = Result((self.rank, K), adapter, parts=4), Result((N, self.rank), adapter, parts=3)
                sum_partials(plan_sum(*both), *(result.empty(x.device) for result in both))
            elif seed is not None:
                pack_bits(plan_pack_bits((M, K), mask_code(dropout_p, seed, self.target)), seed, dropout_p)

    def _run_shared(self, x: Tensor, seed: Tensor | None, dropout_p: float) -> None:
        """S of three projections, and their dA with dx's term."""
        M, K = x.shape
        adapter, words = DTYPES[self.dtype][1], (0, 1, 2)
        A, U = _meta(3 * self.rank, K, dtype=adapter), _meta(3 * M, self.rank, dtype=torch.float32)
        of_x, of_A, of_U = (TensorSpec.of(tensor) for tensor in (x, A, U))
        facts = matmul_precision(x.dtype), self.target
        mask = mask_code(dropout_p, seed, self.target)
        dropout: Any = {"seed": seed, "dropout_p": dropout_p}
        shrink(plan_shrink(of_x, of_A, mask, *facts, words=words), x, A, **dropout)
        if self.target.has_wgmma:  # see `fastlora.kernels.group`
            to_dA = plan_grad_a(of_x, of_U, adapter, *facts, mask=mask, V=of_A, words=words)
            grad_a(to_dA, x, U, A, dx=torch.empty_like(x), **dropout)

    def _run_gated(self, e: Tensor, lora_A: Tensor, S: Tensor, seed: Tensor | None, dropout_p: float) -> None:
        activation, direction = self.step.split("-")
        facts: Any = TensorSpec.of(e), TensorSpec.of(lora_A), activation, mask_code(dropout_p, seed, self.target)
        facts += matmul_precision(e.dtype), self.target
        if direction == "forward":
            gated(plan_gated(*facts), e, e, lora_A, seed=seed, dropout_p=dropout_p)
        else:
            gated_backward(plan_gated_backward(*facts), e, e, e, S, lora_A, seed=seed, dropout_p=dropout_p)


def every_case(ranks: Iterable[int] = RANKS, shapes: Iterable[str] = ("aligned",)) -> list[CompileCase]:
    """The steps in every dtype for every GPU, and once for each GPU the packed mask and the sum."""
    whole = [CompileCase(*key) for key in product((*STEPS[:5], *GATED), DTYPES, ranks, TARGETS, shapes)]
    whole = [case for case in whole if case.capability != GFX942 or case.dtype != "float32-tf32"]  # see `matmul_precision`
    return whole + [CompileCase(step, "bfloat16", 16, capability) for step in ("mask", "sum") for capability in TARGETS]


def gated_cases() -> list[CompileCase]:
    """What the tests compile: each dtype, rank, GPU and shape at least once in both directions and forms.

    With another Triton than the pinned one, which takes the same tiles, less: `python -m tools.compile_report` takes any case.
    """
    keys = [("bfloat16", 16, capability, "aligned") for capability in (80, 90, 100)]
    keys += [("bfloat16", 128, 90, "aligned"), ("bfloat16", 16, 90, "ragged")]
    keys += [(dtype, 16, 90, "aligned") for dtype in DTYPES if dtype != "bfloat16"]
    if IS_PINNED_TRITON:
        keys += [("bfloat16", rank, 90, "aligned") for rank in (8, 64)]
        keys += [("bfloat16", 128, capability, "aligned") for capability in (80, 100)]
        keys += [
            ("bfloat16+float32", 128, 90, "aligned"),
            ("float32-ieee", 16, 80, "aligned"),
            ("float32-tf32", 16, 100, "aligned"),
        ]
        keys += [("bfloat16", 16, 90, shape) for shape in SHAPES if shape not in ("aligned", "ragged")]
    whole = [CompileCase(step, *key) for key in keys for step in STEPS[:4]]
    whole += [CompileCase("shared", *key) for key in keys if key[1] <= 64 and key[3] in ("aligned", "ragged")]
    whole += [CompileCase(step, "bfloat16", 16, 90) for step in ("mask", "sum")]
    whole += _gated_mlps()
    return whole + (_on_other_cards() if IS_PINNED_TRITON else [])


def _gated_mlps() -> list[CompileCase]:
    """Each dtype, large ranks, and shapes without vector loads and with 64-bit offsets."""
    keys = [(dtype, 16, 90, "aligned") for dtype in DTYPES] + [("bfloat16", 16, 90, shape) for shape in ("ragged", "wide")]
    keys += [("bfloat16", 128, 90, "aligned"), ("bfloat16+float32", 128, 90, "aligned"), ("bfloat16", 16, 100, "aligned")]
    keys += [("bfloat16", 16, 80, "aligned"), ("bfloat16+float32", 128, 80, "aligned"), ("float32-ieee", 16, 80, "aligned")]
    whole = [CompileCase(step, *key) for key in keys for step in GATED[:2]]
    return whole + [CompileCase(step, "bfloat16", 16, capability) for step in GATED[2:] for capability in (80, 90)]


def _on_other_cards() -> list[CompileCase]:
    """What shares its tiles with no GPU of the other cases, and what has spilled."""
    cards = (86, 89, 120, GFX942)
    whole = [CompileCase(step, "bfloat16", 16, card) for card in cards for step in ("forward", "backward")]
    for card in (86, 120):
        whole += [
            CompileCase("addmm-backward", "bfloat16", 16, card),
            CompileCase("addmm-backward", "float16+float32", 128, card),
            CompileCase("forward", "bfloat16", 16, card, "ragged"),
        ]
    return [
        *whole,
        CompileCase("forward", "bfloat16+float32", 32, 86),
        CompileCase("addmm-backward", "bfloat16+float32", 32, 86),
        CompileCase("addmm-backward", "bfloat16+float32", 64, 86),
        CompileCase("forward", "float16+float32", 128, 86),
        CompileCase("forward", "bfloat16", 128, 120),
        CompileCase("backward", "bfloat16+float32", 16, 120),
        CompileCase("backward", "float16+float32", 16, GFX942),
    ]


def _meta(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before
