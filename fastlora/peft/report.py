"""The report on the LoRA layers of a model, and the count of calls that ran PEFT's forward."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

from fastlora import torch_backend

NAMES_SHOWN = 3

#: The reason why a small call on a CPU runs PEFT's forward.
SMALL = "few elements on a CPU, where PEFT's forward takes less time"

#: The reason why a convolution on a CPU does. In float32 a step takes 0.75 to 0.97 of PEFT's time where pixels of x are rows
#: of memory already, and up to 1.11 where they have to be copied first: patches, and channels before pixels.
COPIED = "on a CPU a convolution that copies x takes longer than PEFT's"


@dataclass(frozen=True, repr=False)
class Report:
    """What the forward of each LoRA layer of a model is. Printed, it groups the layers by reason.

    taken: names of the layers that run through `lora_linear`, and of those on experts, which `fastlora.peft.experts` computes.
    waiting: (name, reason) of accelerated layers whose calls run PEFT's forward as long as the adapters are as they are now.
    left: (name, reason) of layers that are not accelerated.
    already: names of the layers that an earlier `accelerate` took. They are in `taken` or `waiting` too.
    backends: (type of device, backend) that accelerated linears run on by default.
    groups: names of the layers that share x, as seen in training, in one tuple a group.
    single: (name, reason) of accelerated layers that are computed alone although they might share x.
    mlps: names of the gated MLPs whose three linears are computed as one step.
    mlps_left: (name, reason) of those that are not, where `accelerate` was asked to take them.
    """

    taken: tuple[str, ...]
    waiting: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    already: tuple[str, ...] = ()
    backends: tuple[tuple[str, str], ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    single: tuple[tuple[str, str], ...] = ()
    mlps: tuple[str, ...] = ()
    mlps_left: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        total = len(self.taken) + len(self.waiting) + len(self.left)
        shared = f", {len(self.groups)} group{'s' * (len(self.groups) > 1)} share{'s' * (len(self.groups) == 1)} x"
        lines = [f"fastlora: {len(self.taken)} of {total} LoRA layers accelerated" + shared * bool(self.groups)]
        if self.already:
            lines.append(f"  already accelerated: {len(self.already)}")
        groups: dict[str, list[str]] = {}
        if self.mlps:
            lines.append(f"  {len(self.mlps)} gated MLPs computed as one step")
        layers = ("waiting", self.waiting), ("left", self.left), ("computed alone", self.single)
        for state, others in (*layers, ("gated MLP left", self.mlps_left)):
            for name, reason in others:
                groups.setdefault(f"  {state}, {reason}", []).append(name)
        for reason, names in groups.items():
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            lines.append(f"{reason}: {len(names)} ({', '.join(names[:NAMES_SHOWN])}{more})")
        for device, backend in self.backends:
            note = ", which saves memory rather than time on this device" if backend == "torch" else ""
            lines.append(f"  backend on {device}: {backend}{note}")
            if device == "cpu" and torch_backend.BREAK_EVEN:
                lines.append(f"  calls with fewer than {torch_backend.BREAK_EVEN} elements run PEFT's forward, which is faster")
        return "\n".join(lines)


@dataclass
class Tally:
    """The calls of one layer that ran PEFT's forward, by reason; `warned` is shared by the layers of one model."""

    warned: set[str]
    fallbacks: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, *, warn: bool) -> None:
        """Count a call. With `warn`, warn if no layer of this model has given this reason before."""
        self.fallbacks[reason] += 1
        if warn and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"an accelerated LoRA layer trains through PEFT's own forward: {reason}. This warning appears once for each "
                "reason; fastlora.peft.fallbacks(model) counts such calls by layer",
                stacklevel=2,
            )
