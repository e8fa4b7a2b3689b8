"""The job: pretrain, adapt with eager and with fused LoRA linears in lockstep, check, report."""

import time
from argparse import Namespace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import save_adapter
from fastlora.benchmark import saved_bytes
from fastlora.cli import common
from fastlora.finetune import check, report
from fastlora.finetune.data import batches, load_corpus, tokenize_corpus
from fastlora.finetune.model import DTYPES, load_base, next_token_loss, with_adapters
from fastlora.injection.matching import match_targets
from fastlora.modules import FusedLoraLinear
from fastlora.reference import EagerLoraLinear

Curve = list[tuple[float, float]]  # the loss and the seconds of each step


def prepare(args: Namespace) -> tuple[dict[str, Tensor], Any]:
    """The tokens and the base model, not yet pretrained.  Checks everything before any training; makes the output folder.

    Raises:
        ValueError, TypeError: an option does not fit the model or the text.
        OSError: a file cannot be read or written.
    """
    corpus = load_corpus(args.text)
    base, tokenize = load_base(args)
    tokens = tokenize_corpus(corpus, tokenize, args.seq_len)
    match_targets(base, args.target_modules)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {str(args.output)!r} is a file, expected a folder or a new name")
    args.output.mkdir(parents=True, exist_ok=True)
    return {name: text.to(args.device) for name, text in tokens.items()}, base


def run(args: Namespace, tokens: dict[str, Tensor], base: Any) -> dict[str, Any]:
    """Train, compare and check; returns the report.  Writes the adapter and, if it was made here, the base model."""
    start = time.perf_counter()
    # The small model's operations are too small for several threads.
    torch.set_num_threads(args.threads or (1 if args.model is None else torch.get_num_threads()))
    if args.model is None:
        train("pretrain", {"loss": base}, tokens["pretrain"], args)
        base.to(DTYPES[args.dtype]).save_pretrained(args.output / "base")  # for PeftModel.from_pretrained

    fused = with_adapters(base, args, FusedLoraLinear)
    models = {"eager": with_adapters(base, args, EagerLoraLinear), "fused": fused}
    batch = next(batches(tokens["adapt"], args.batch_size, args.seq_len, args.seed))
    before = {name: held_out_losses(model, tokens["held_out"], args) for name, model in models.items()}
    saved = {name: kept_for_backward(model, batch) for name, model in models.items()}
    curves = train("adapt", models, tokens["adapt"], args)
    after = {name: held_out_losses(model, tokens["held_out"], args) for name, model in models.items()}
    save_adapter(fused, args.output / "adapter")
    outcomes = {name: report.outcome(before[name], after[name], curves[name], saved[name]) for name in models}

    control = None
    if args.check:
        layers = check.check_layers(fused, batch, args.seed)
        noisy = with_adapters(base, args, EagerLoraLinear)
        check.disturb(noisy, layers, args.seed)
        losses = [loss for loss, _ in train("control", {"control": noisy}, tokens["adapt"], args)["control"]]
        control = {
            "layers": [{"layer": name, "passed": row.passed, **vars(row)} for name, rows in layers.items() for row in rows],
            "unreached": [n for n, m in fused.named_modules() if isinstance(m, FusedLoraLinear) and n not in layers],
            "losses": losses,
            "curve_bound": check.curve_bound(losses, outcomes["eager"]["losses"], DTYPES[args.dtype]),
        }
    return report.assemble(args, fused, tokens, outcomes, control) | {"seconds": time.perf_counter() - start}


def train(phase: str, models: dict[str, nn.Module], stream: Tensor, args: Namespace) -> dict[str, Curve]:
    """Train all models by AdamW in lockstep; returns the curve of each.

    In each step the models see the same batch and the same generator state, so the same masks.  They take turns in going first,
    so that no model always finds the caches warm.  The learning rate rises linearly over the first tenth of the steps and falls
    linearly to zero over the rest.  The phase `pretrain` has its own learning rate and number of steps, and adds weight decay
    and a bound of 1 on the norm of the gradients.
    """
    pretraining = phase == "pretrain"
    steps, lr = (args.pretrain_steps, args.pretrain_lr) if pretraining else (args.steps, args.lr)
    warm_up, decay = max(1, steps // 10), 0.01 if pretraining else 0.0
    optimizers = {name: torch.optim.AdamW(model.train().parameters(), weight_decay=decay) for name, model in models.items()}
    curves: dict[str, Curve] = {name: [] for name in models}
    drawn = islice(batches(stream, args.batch_size, args.seq_len, args.seed), steps)
    with common.progress(steps, silent=args.json) as advance:
        for step, ids in enumerate(drawn):
            for name in sorted(models, reverse=step % 2 == 1):
                torch.manual_seed(args.seed + step)
                start, optimizer = time.perf_counter(), optimizers[name]
                loss = next_token_loss(models[name], ids).mean()
                loss.backward()
                if pretraining:
                    nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
                optimizer.step()
                optimizer.zero_grad()
                # item() waits for the device, to the end of the update.
                curves[name].append((loss.item(), time.perf_counter() - start))
            losses = "  ".join(f"{name} {curve[-1][0]:.3f}" for name, curve in curves.items())
            speed = ids.numel() * len(models) / sum(curve[-1][1] for curve in curves.values())
            advance(f"{phase}  {losses}  {speed:,.0f} tokens/s")
    return curves


@torch.no_grad()
def held_out_losses(model: nn.Module, windows: Tensor, args: Namespace) -> Tensor:
    """The loss of each held-out window without dropout, (n,) in float64 on the CPU."""
    losses = [next_token_loss(model.eval(), ids) for ids in windows.split(args.batch_size)]
    return torch.cat(losses).double().cpu()


def kept_for_backward(model: nn.Module, ids: Tensor) -> int:
    """Bytes that one training step saves for backward, without parameters and buffers."""
    return saved_bytes(lambda: next_token_loss(model.train(), ids).mean(), (*model.parameters(), *model.buffers()))
