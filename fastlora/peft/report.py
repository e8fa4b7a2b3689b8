"""What happened to the LoRA layers of a model, and which of their calls took PEFT's forward."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NAMES_SHOWN = 3


@dataclass(frozen=True, repr=False)
class Report:
    """The LoRA layers of a model by what their forward is; printed, it groups them by reason.

    taken: names of the layers that run through `lora_linear`.
    waiting: (name, reason) of layers that would, were it not for the adapters' present state: until that changes, their calls
        take PEFT's forward.
    left: (name, reason) of layers that are not accelerated.
    """

    taken: tuple[str, ...]
    waiting: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        total = len(self.taken) + len(self.waiting) + len(self.left)
        lines = [f"fastlora: {len(self.taken)} of {total} LoRA layers accelerated"]
        lines += (f"  waiting, {line}" for line in _grouped(self.waiting))
        lines += (f"  left, {line}" for line in _grouped(self.left))
        return "\n".join(lines)


def _grouped(others: Iterable[tuple[str, str]]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in others:
        names.setdefault(reason, []).append(name)
    lines = []
    for reason, of_reason in names.items():
        rest = len(of_reason) - NAMES_SHOWN
        shown = ", ".join(of_reason[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        lines.append(f"{reason}: {len(of_reason)} ({shown})")
    return lines


@dataclass
class Tally:
    """The calls of one layer that took PEFT's forward, by reason; `warned` is shared by the layers of one model."""

    warned: set[str]
    fallbacks: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, *, warn: bool) -> None:
        """Count a call; with `warn`, say so the first time a layer of this model gives this reason."""
        self.fallbacks[reason] += 1
        if warn and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"an accelerated LoRA layer trains through PEFT's own forward: {reason}. Said once for each reason; "
                "fastlora.peft.fallbacks(model) counts such calls by layer",
                stacklevel=2,
            )
