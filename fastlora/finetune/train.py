"""The adaptation itself: runs in lockstep, their loss, their time and what they keep for backward."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlora.benchmark import saved_bytes
from fastlora.finetune.data import batches
from fastlora.finetune.model import next_token_loss, warm_up_and_decay
from fastlora.finetune.settings import Settings

Step = Callable[[int, dict[str, float]], None]


@dataclass
class Run:
    """One model in training: its optimizer, and the loss and seconds of each step so far."""

    model: nn.Module
    settings: Settings
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=self.settings.lr, weight_decay=0.0)
        self.schedule = warm_up_and_decay(self.optimizer, self.settings.steps)

    def step(self, ids: Tensor) -> None:
        """Forward, backward and update on one batch, timed to the end of the device's work."""
        _wait(ids.device)
        start = time.perf_counter()
        loss = next_token_loss(self.model, ids).mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        _wait(ids.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def adapt(runs: dict[str, Run], stream: Tensor, settings: Settings, on_step: Step) -> None:
    """Train all runs side by side: every step has the same batch and the same generator state, and so the same masks.

    The runs take turns in going first, so that none has a warmer cache throughout. `on_step(step, losses)` hears of each step.
    """
    source = batches(stream, settings.batch_size, settings.seq_len, settings.seed)
    names = list(runs)
    for run in runs.values():
        run.model.train()
    for step in range(settings.steps):
        ids = next(source).to(settings.device)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            torch.manual_seed(settings.seed + step)
            runs[name].step(ids)
        on_step(step + 1, {name: run.losses[-1] for name, run in runs.items()})


@torch.no_grad()
def held_out_losses(model: nn.Module, windows: Tensor, settings: Settings) -> Tensor:
    """The loss of each held-out window, (n,), without dropout."""
    model.eval()
    chunks = windows.split(settings.batch_size)
    return torch.cat([next_token_loss(model, chunk.to(settings.device)) for chunk in chunks]).cpu()


def kept_for_backward(model: nn.Module, ids: Tensor) -> int:
    """Bytes that one training step keeps between forward and backward, parameters and buffers aside."""
    model.train()
    return saved_bytes(lambda: next_token_loss(model, ids).mean(), (*model.parameters(), *model.buffers()))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(parameters: Iterable[Tensor]) -> int:
    """The number of elements in all of them."""
    return sum(parameter.numel() for parameter in parameters)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
