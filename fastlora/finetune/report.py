"""What a run found: figures, verdicts, JSON."""

import json
import math
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastlora.finetune.check import LayerError, distance
from fastlora.finetune.settings import Settings
from fastlora.functional import available_backends


@dataclass(frozen=True)
class Outcome:
    """One implementation: held-out loss before and after (mean over windows), curve, median step, bytes kept for backward.

    `gain_error` is the standard error of the gain, from its spread over the held-out windows.
    """

    before: float
    after: float
    gain: float
    gain_error: float
    step_seconds: float
    saved_bytes: int
    losses: list[float]

    @classmethod
    def of(cls, before: Tensor, after: Tensor, losses: list[float], seconds: list[float], saved_bytes: int) -> "Outcome":
        """From the losses of each held-out window and the loss and seconds of each step."""
        gain = (before - after).double()
        return cls(
            before=float(before.double().mean()),
            after=float(after.double().mean()),
            gain=float(gain.mean()),
            gain_error=float(gain.std() / len(gain) ** 0.5),
            step_seconds=statistics.median(seconds),
            saved_bytes=saved_bytes,
            losses=losses,
        )

    @property
    def learned(self) -> bool:
        """Whether the held-out loss fell by more than chance: two standard errors."""
        return self.gain > 2 * self.gain_error


@dataclass(frozen=True)
class Control:
    """What the checks measured, see fastlora.finetune.check: layer errors, the control's curve, the bound for the fused one.

    `unreached` names the layers that had no part in the loss of the checked batch, and so no errors.
    """

    layers: list[LayerError]
    unreached: list[str]
    losses: list[float]
    curve_bound: float

    @property
    def worst(self) -> LayerError:
        """The layer output that comes nearest to its bound, or passes it by most."""
        return max(self.layers, key=lambda error: error.error / error.bound)


@dataclass(frozen=True)
class Verdict:
    """One question, its answer and the figures behind it; `passed` None: not asked."""

    question: str
    passed: bool | None
    figures: str


@dataclass(frozen=True)
class Report:
    """All that a run found. `control` is None when the checks were switched off."""

    settings: Settings
    environment: dict[str, Any]
    outcomes: dict[str, Outcome]
    control: Control | None
    trainable: int
    parameters: int
    tokens: dict[str, int]
    seconds: float

    @property
    def largest_difference(self) -> float:
        """Between the fused and the eager loss at one step; NaN when a loss is."""
        fused, eager = self.outcomes["fused"].losses, self.outcomes["eager"].losses
        return max(abs(a - b) for a, b in zip(fused, eager, strict=True))

    @property
    def curve_distance(self) -> float:
        """Between the fused and the eager loss curve, root mean square over steps."""
        return distance(self.outcomes["fused"].losses, self.outcomes["eager"].losses)

    @property
    def verdicts(self) -> list[Verdict]:
        """The three questions that decide over the exit code."""
        learned = Verdict(
            "held-out loss fell by more than two standard errors",
            all(outcome.learned for outcome in self.outcomes.values()),
            ", ".join(f"{name} {o.gain:+.4f} ± {o.gain_error:.4f}" for name, o in self.outcomes.items()),
        )
        layers, curves = "every layer as exact as eager, by float64", "curves no further apart than rounding takes them"
        apart = f"{self.curve_distance:.1e} apart (root mean square)"
        if self.control is None:
            return [learned, Verdict(layers, None, "not checked"), Verdict(curves, None, f"{apart}, not checked")]
        worst, unreached = self.control.worst, self.control.unreached
        return [
            learned,
            Verdict(
                layers,
                all(error.passed for error in self.control.layers),
                f"{len(self.control.layers)} results, nearest to its bound: {worst.output} of {worst.layer}, "
                f"{worst.error:.1e} of {worst.bound:.1e}" + (f"; not reached: {', '.join(unreached)}" if unreached else ""),
            ),
            Verdict(curves, self.curve_distance <= self.control.curve_bound, f"{apart}, bound {self.control.curve_bound:.1e}"),
        ]

    @property
    def passed(self) -> bool:
        """Whether no verdict is negative."""
        return all(verdict.passed is not False for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "passed": self.passed,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "largest_difference": self.largest_difference,
            "curve_distance": self.curve_distance,
            "trainable_share": self.trainable / self.parameters,
            **asdict(self),
        }


def environment(settings: Settings) -> dict[str, Any]:
    """Where the figures come from: versions, device, threads, backend."""
    device = settings.device
    return {
        "versions": {"python": platform.python_version()} | {
            name: _version(name) for name in ("fastlora", "torch", "triton", "transformers", "safetensors")
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": settings.backend or available_backends(device)[0],
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def to_json(report: Report) -> str:
    """The report as indented JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(report.as_dict()), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
