"""The main job from beginning to end: prepare, pretrain, adapt twice in lockstep, check, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.adapters import save_adapter
from fastlora.finetune import check
from fastlora.finetune.data import Tokens, batches, load_corpus, tokenize_corpus
from fastlora.finetune.eager import EagerLoraLinear
from fastlora.finetune.model import load_base, load_tokenizer, pretrain, with_adapters
from fastlora.finetune.report import Control, Outcome, Report, environment
from fastlora.finetune.settings import Settings
from fastlora.finetune.train import Run, adapt, count, held_out_losses, kept_for_backward, trainable
from fastlora.injection.matching import match_targets
from fastlora.modules import FusedLoraLinear

#: Hears of every step: phase, step, steps in the phase, losses by name, tokens per step.
Progress = Callable[[str, int, int, dict[str, float], int], None]


@dataclass(frozen=True)
class Job:
    """A run that can start: the settings hold together, the text is read, the base model is there, not yet pretrained."""

    settings: Settings
    tokens: Tokens
    base: nn.Module


def prepare(settings: Settings) -> Job:
    """Read everything a run needs and check it, before anything is trained; makes the output folder.

    Raises:
        ValueError, TypeError: a setting that does not fit the model or the text.  OSError: what cannot be read or written.
    """
    tokenize = load_tokenizer(settings)
    tokens = tokenize_corpus(load_corpus(settings.text), tokenize, settings.seq_len)
    base = load_base(settings)
    match_targets(base, settings.target_modules)
    if settings.output.exists() and not settings.output.is_dir():
        raise ValueError(f"--output: {str(settings.output)!r} is a file, expected a folder or a new name")
    settings.output.mkdir(parents=True, exist_ok=True)
    return Job(settings, tokens, base)


def run(job: Job, progress: Progress) -> Report:
    """Train, compare and check; writes the adapter and, where it was made here, the base model to the output folder."""
    settings, tokens = job.settings, job.tokens
    start = time.perf_counter()
    torch.set_num_threads(settings.threads or (1 if settings.model is None else torch.get_num_threads()))
    base = _base(job, progress)
    runs = {
        "eager": Run(with_adapters(base, settings, EagerLoraLinear), settings),
        "fused": Run(with_adapters(base, settings, FusedLoraLinear), settings),
    }
    before = {name: held_out_losses(run.model, tokens.held_out, settings) for name, run in runs.items()}
    batch = next(batches(tokens.adapt, settings.batch_size, settings.seq_len, settings.seed)).to(settings.device)
    saved = {name: kept_for_backward(run.model, batch) for name, run in runs.items()}
    adapt(runs, tokens.adapt, settings, _hears(progress, "adapt", settings))
    after = {name: held_out_losses(run.model, tokens.held_out, settings) for name, run in runs.items()}
    save_adapter(runs["fused"].model, settings.output / "adapter")
    return Report(
        settings=settings,
        environment=environment(settings),
        outcomes={
            name: Outcome.of(before[name], after[name], run.losses, run.seconds, saved[name]) for name, run in runs.items()
        },
        control=_control(runs, base, batch, job, progress) if settings.check else None,
        trainable=count(trainable(runs["fused"].model)),
        parameters=count(runs["fused"].model.parameters()),
        tokens={"pretrain": len(tokens.pretrain), "adapt": len(tokens.adapt), "held_out": tokens.held_out.numel()},
        seconds=time.perf_counter() - start,
    )


def _base(job: Job, progress: Progress) -> nn.Module:
    """The base model in its final dtype; one that was made here is pretrained and saved, for PeftModel.from_pretrained."""
    settings, base = job.settings, job.base
    if settings.model is None:
        hears = _hears(progress, "pretrain", settings)
        pretrain(base, job.tokens.pretrain, settings, lambda step, loss: hears(step, {"loss": loss}))
        base = base.to(settings.base_dtype)
        base.save_pretrained(settings.output / "base")  # type: ignore[operator]  # transformers' method, unknown to nn.Module
    return base


def _control(runs: dict[str, Run], base: nn.Module, batch: Tensor, job: Job, progress: Progress) -> Control:
    """Judge the layers of the trained fused model, then train the control with the errors that would just pass."""
    settings = job.settings
    layers, unreached = check.check_layers(runs["fused"].model, batch, settings.seed)
    control = Run(with_adapters(base, settings, EagerLoraLinear), settings)
    check.disturb(control.model, layers, settings.seed)
    adapt({"control": control}, job.tokens.adapt, settings, _hears(progress, "control", settings))
    bound = check.curve_bound(control.losses, runs["eager"].losses, settings.base_dtype)
    return Control(layers=layers, unreached=unreached, losses=control.losses, curve_bound=bound)


def _hears(progress: Progress, phase: str, settings: Settings) -> Callable[[int, dict[str, float]], None]:
    steps = settings.pretrain_steps if phase == "pretrain" else settings.steps
    tokens = settings.batch_size * settings.seq_len

    def hears(step: int, losses: dict[str, float]) -> None:
        progress(phase, step, steps, losses, tokens * len(losses))

    return hears
