"""The job: pretrain, adapt with eager and with fused LoRA linears in lockstep, check, report."""

import os
import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import save_adapter
from fastlora.benchmark import saved_bytes
from fastlora.cli.progress import AfterStep
from fastlora.environment import environment
from fastlora.finetune import check, report
from fastlora.finetune.data import batches, load_corpus, tokenize_corpus
from fastlora.finetune.eager import EagerLoraLinear
from fastlora.finetune.model import DTYPES, load_base, load_tokenizer, next_token_loss, with_adapters
from fastlora.functional import available_backends
from fastlora.injection.matching import match_targets
from fastlora.modules import FusedLoraLinear

Curves = tuple[dict[str, list[float]], dict[str, list[float]]]


def prepare(args: Namespace) -> tuple[dict[str, Tensor], Any]:
    """The tokens and the base model, not yet pretrained.  Checks everything before any training; makes the output folder.

    Raises:
        ValueError, TypeError: an option does not fit the model or the text.
        OSError: a file cannot be read or written.
    """
    tokens = tokenize_corpus(load_corpus(args.text), load_tokenizer(args), args.seq_len)
    base = load_base(args)
    match_targets(base, args.target_modules)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {str(args.output)!r} is a file, expected a folder or a new name")
    args.output.mkdir(parents=True, exist_ok=True)
    return tokens, base


def run(args: Namespace, tokens: dict[str, Tensor], base: Any, after_step: AfterStep) -> dict[str, Any]:
    """Train, compare and check; returns the report.  Writes the adapter and, if it was made here, the base model."""
    start = time.perf_counter()
    # The small model's operations are too small for several threads.
    torch.set_num_threads(args.threads or (1 if args.model is None else torch.get_num_threads()))
    if args.model is None:
        train("pretrain", {"loss": base}, tokens["pretrain"], args, after_step)
        base.to(DTYPES[args.dtype]).save_pretrained(args.output / "base")  # for PeftModel.from_pretrained

    fused = with_adapters(base, args, FusedLoraLinear)
    models = {"eager": with_adapters(base, args, EagerLoraLinear), "fused": fused}
    batch = next(batches(tokens["adapt"], args.batch_size, args.seq_len, args.seed)).to(args.device)
    before = {name: held_out_losses(model, tokens["held_out"], args) for name, model in models.items()}
    saved = {name: kept_for_backward(model, batch) for name, model in models.items()}
    losses, seconds = train("adapt", models, tokens["adapt"], args, after_step)
    after = {name: held_out_losses(model, tokens["held_out"], args) for name, model in models.items()}
    save_adapter(fused, args.output / "adapter")
    outcomes = {n: report.outcome(before[n], after[n], losses[n], seconds[n], saved[n]) for n in models}

    control = None
    if args.check:
        layers = check.check_layers(fused, batch, args.seed)
        noisy = with_adapters(base, args, EagerLoraLinear)
        check.disturb(noisy, layers, args.seed)
        curve = train("control", {"control": noisy}, tokens["adapt"], args, after_step)[0]["control"]
        control = {
            "layers": [{"layer": name, "passed": row.passed, **vars(row)} for name, rows in layers.items() for row in rows],
            "unreached": [name for name, rows in layers.items() if not rows],
            "losses": curve,
            "curve_bound": check.curve_bound(curve, losses["eager"], DTYPES[args.dtype]),
        }
    sizes = {parameter: parameter.numel() for parameter in fused.parameters()}
    trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    backend = args.backend or available_backends(args.device)[0]
    return {
        **report.verdicts(outcomes, control),
        "settings": {name: value for name, value in vars(args).items() if name not in ("func", "json")},
        "environment": environment(args.device)
        | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "backend": backend},
        "outcomes": outcomes,
        "control": control,
        "trainable": trainable,
        "parameters": sum(sizes.values()),
        "trainable_share": trainable / sum(sizes.values()),
        "tokens": {name: part.numel() for name, part in tokens.items()},
        "seconds": time.perf_counter() - start,
    }


def train(phase: str, models: dict[str, nn.Module], stream: Tensor, args: Namespace, after_step: AfterStep) -> Curves:
    """Train all models by AdamW in lockstep; returns the loss and the seconds of each step, by the model's name.

    In each step the models see the same batch and the same generator state, so the same masks.  They take turns in going first,
    so that no model always finds the caches warm.  The learning rate rises linearly over the first tenth of the steps and falls
    linearly to zero over the rest.  The phase `pretrain` has its own learning rate and number of steps, and adds weight decay
    and a bound of 1 on the norm of the gradients.
    """
    pretraining = phase == "pretrain"
    steps, lr = (args.pretrain_steps, args.pretrain_lr) if pretraining else (args.steps, args.lr)
    warm_up, decay = max(1, steps // 10), 0.01 if pretraining else 0.0
    optimizers = {name: torch.optim.AdamW(model.train().parameters(), weight_decay=decay) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    turns = list(models)
    for step, batch in zip(range(steps), batches(stream, args.batch_size, args.seq_len, args.seed), strict=False):
        ids = batch.to(args.device)
        for name in turns:
            torch.manual_seed(args.seed + step)
            start, optimizer = time.perf_counter(), optimizers[name]
            loss = next_token_loss(models[name], ids).mean()
            loss.backward()
            if pretraining:
                nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())  # waits for the device, to the end of the update
            seconds[name].append(time.perf_counter() - start)
        turns = turns[1:] + turns[:1]
        after_step(phase, step + 1, steps, {name: losses[name][-1] for name in models}, ids.numel() * len(models))
    return losses, seconds


@torch.no_grad()
def held_out_losses(model: nn.Module, windows: Tensor, args: Namespace) -> Tensor:
    """The loss of each held-out window without dropout, (n,) in float64 on the CPU."""
    model.eval()
    losses = [next_token_loss(model, ids.to(args.device)) for ids in windows.split(args.batch_size)]
    return torch.cat(losses).double().cpu()


def kept_for_backward(model: nn.Module, ids: Tensor) -> int:
    """Bytes that one training step saves for backward, without parameters and buffers."""
    model.train()
    return saved_bytes(lambda: next_token_loss(model, ids).mean(), (*model.parameters(), *model.buffers()))
