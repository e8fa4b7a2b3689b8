"""What `fastlora finetune` can be told, with the defaults of `make demo`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlora.functional import available_backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; equal settings give equal runs on one machine.

    `adapter_dtype` None is float32, `backend` None the one fastlora chooses. Without `model` a small one, described by the last
    four fields, is built and pretrained; its operations are too small to share, so for it `threads` None is one thread, else as
    many as torch has.

    Raises ValueError, naming the option of the command line, for anything out of range or that this machine cannot run.
    """

    model: Path | None = None
    text: tuple[Path, ...] = ()
    target_modules: str | tuple[str, ...] = "all-linear"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    steps: int = 200
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 1e-2
    seed: int = 0
    dtype: str = "float32"
    adapter_dtype: str | None = None
    device: torch.device = CPU
    backend: str | None = None
    threads: int | None = None
    output: Path = Path("fastlora-finetune")
    check: bool = True
    hidden_size: int = 128
    layers: int = 2
    pretrain_steps: int = 600
    pretrain_lr: float = 2e-3

    def __post_init__(self) -> None:
        least = {
            "r": 1, "steps": 1, "batch_size": 1, "seq_len": 2, "seed": 0, "hidden_size": 32, "layers": 1, "pretrain_steps": 0,
        }  # fmt: skip
        for name, low in least.items():
            _expect(getattr(self, name) >= low, name, getattr(self, name), f"an integer of at least {low}")
        if self.threads is not None:
            _expect(self.threads >= 1, "threads", self.threads, "an integer of at least 1")
        for name in ("lr", "pretrain_lr", "alpha"):
            value = getattr(self, name)
            _expect(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        _expect(0 <= self.dropout < 1, "dropout", self.dropout, "a rate in [0, 1)")
        _expect(self.seed < 2**63, "seed", self.seed, "an integer below 2**63")
        _expect(self.hidden_size % 32 == 0, "hidden_size", self.hidden_size, "a multiple of 32, the size of a head")
        _expect(bool(self.target_modules), "target_modules", self.target_modules, "at least one name")
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        adapter_dtypes = ("float32", self.dtype)
        _expect(
            self.adapter_dtype in (None, *adapter_dtypes), "adapter_dtype", self.adapter_dtype, " or ".join({*adapter_dtypes})
        )
        if self.backend is not None:
            here = available_backends(self.device)
            _expect(self.backend in here, "backend", self.backend, f"{' or '.join(here)} for tensors on {self.device}")

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the frozen model."""
        return DTYPES[self.dtype]

    @property
    def lora_dtype(self) -> torch.dtype:
        """The dtype of A and B."""
        return DTYPES[self.adapter_dtype or "float32"]


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')}: got {str(value)!r}, expected {expected}")
