"""What is measured beside single linears, who takes part, and on which sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benches.shapes import MODELS, Decoder
from fastlora.benchmark import PASSES
from fastlora.benchmark.clock import Step

R, DROPOUT_P = 16, 0.1

ATTENTION, MLP = "attention projections", "gated MLP"
LAYER, TRAINING_STEP = "decoder layer", "training step"
PASSES_OF = {ATTENTION: PASSES, MLP: PASSES, LAYER: PASSES, TRAINING_STEP: (TRAINING_STEP,)}

FROZEN, PEFT = "frozen", "PEFT"  # ratios are relative to these two
CHAINED, COMPILED_PEFT = "chained addmm_, p = 0", "compiled PEFT"
SINGLE, FASTLORA = "fastlora, single linears", "fastlora"

Steps = dict[tuple[str, str], Step]  # by (provider, pass)
Failed = Callable[[str, Exception], None]  # called with a provider that is wrong or fails, and its error


def contenders(compiler: str | None) -> tuple[str, ...]:
    """Who takes part, in the order of the tables."""
    return FROZEN, PEFT, CHAINED, *([COMPILED_PEFT] if compiler else []), SINGLE, FASTLORA


@dataclass(frozen=True)
class Setting:
    """Which model, in which dtype, on how many tokens; the backend of torch.compile, or None."""

    name: str
    decoder: Decoder
    batch: int
    length: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    compiler: str | None = None

    @property
    def rows(self) -> int:
        """M, the number of tokens."""
        return self.batch * self.length

    @property
    def checked(self) -> tuple[int, int]:
        """Batch and length of what a model is checked on: more than `accelerate` leaves to PEFT on a CPU."""
        return min(self.batch, 2), min(self.length, 256)

    def facts(self, kind: str) -> dict[str, Any]:
        """The columns of a row that say what was measured."""
        size = {"M": self.rows, "r": R, "p": DROPOUT_P}
        dtypes = {"dtype": self.dtype, "adapter_dtype": self.adapter_dtype}
        names = {column: str(dtype).removeprefix("torch.") for column, dtype in dtypes.items()}
        return {"kind": kind, "id": kind, "used_by": self.name, **size, **names}


_SMALL = {"toy": Decoder(64, 96, 4, 2, 16, 2, 128), "cpu": Decoder(512, 1408, 8, 4, 64, 2, 1024)}
_ON_GPU = {TRAINING_STEP: ("Llama-3.2-1B", 4, 1024)}  # model, batch, length
_OTHERS_ON_GPU = "Llama-3.1-8B", 4, 2048


def setting(kind: str, device: torch.device, *, compiler: str | None = None, toy: bool = False) -> Setting:
    """What is measured on `device`.  Adapters of a block have its dtype, those of a model PEFT's default, float32."""
    if not toy and device.type == "cuda":
        name, batch, length = _ON_GPU.get(kind, _OTHERS_ON_GPU)
        adapters = torch.bfloat16 if kind in (ATTENTION, MLP) else torch.float32
        return Setting(name, MODELS[name], batch, length, torch.bfloat16, adapters, compiler)
    small = _SMALL["toy" if toy else "cpu"]
    length = 16 if toy else 256
    return Setting(f"Llama of width {small.hidden}", small, 2, length, torch.float32, torch.float32, compiler)


@dataclass(frozen=True)
class Ready:
    """Steps that were checked, and the tensors that exist anyway and do not count as saved for backward."""

    steps: Steps
    parameters: list[Tensor]


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    """Its trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
