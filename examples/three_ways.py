"""What sentiment.py and qa.py share: one recipe with PEFT, with PEFT accelerated and without PEFT, side by side.

The recipe is the published one for encoders: adapters on query and value; biases, LayerNorms and the head train whole.
The three models start from the same weights and adapters, see the same batches and take turns.  Each is saved; a fresh process
reloads all three and answers again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch
import transformers
from offline import check_that_it_falls
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

import fastlora

WAYS = ("peft", "accelerated", "injected")

Batch = dict[str, Tensor]
Answer = tuple[object, float]  # what the model says, and its score
Row = TypeVar("Row")


class Task(NamedTuple):
    """What a script trains and asks.  `answer` and `figures` are about the held-out data, in its order."""

    build: Callable[[], nn.Module]  # the pretrained model, with a new head
    head: str  # the name of the head
    batches: Callable[[], Iterator[Batch]]  # without end; the same ones in each call
    answer: Callable[[nn.Module], list[Answer]]
    figures: Callable[[list[Answer]], str]


def parser(description: str, data: str) -> argparse.ArgumentParser:
    """The arguments of both scripts; `data` describes the file."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="hub id or folder of an encoder (default: a small BERT with random weights)")
    made.add_argument("--data", type=Path, help=f"{data} (default: sums in words)")
    made.add_argument("--held-out", type=Path, help="another such file to measure on (default: a fifth of --data)")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--lr", type=float, default=2e-3, help="learning rate; it falls linearly to zero")
    made.add_argument("--dropout", type=float, default=0.1, help="of the adapters")
    made.add_argument("--output", type=Path, help="folder for the adapters, one for each way (default: a temporary one)")
    made.add_argument("--score", type=Path, metavar="OUTPUT", help="train nothing: print the answers of the models saved there")
    return made


def data(
    args: argparse.Namespace, read: Callable[[Path], list[Row]], sums: list[Row], key: Callable[[Row], Hashable]
) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those to measure on: without --held-out the rows of every fifth key, so no key is in both."""
    rows = read(args.data) if args.data else sums
    if args.held_out:
        parts = rows, read(args.held_out)
    else:
        place = {name: i for i, name in enumerate(dict.fromkeys(map(key, rows)))}
        parts = [row for row in rows if place[key(row)] % 5 != 4], [row for row in rows if place[key(row)] % 5 == 4]
    if not all(parts):
        raise SystemExit(f"{len(parts[0])} rows to train on and {len(parts[1])} held out: expected at least one of each")
    return parts


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(script: str, argv: Sequence[str], args: argparse.Namespace, task: Task) -> None:
    """Train, save, and compare with a fresh process; with --score be that process."""
    transformers.utils.logging.disable_progress_bar()
    if args.score:
        print(json.dumps({way: task.answer(reload(task, way, args.score).eval()) for way in WAYS}))
        return
    models = {way: adapt(task, way, args.dropout) for way in WAYS}
    with tempfile.TemporaryDirectory() as start:  # PEFT draws A from other random numbers
        models["peft"].save_pretrained(start)
        fastlora.load_adapter(models["injected"], start)
    for way, model in models.items():
        trained, total = fastlora.get_nb_trainable_parameters(model)
        print(f"{way:<12} {trained:,} trainable parameters of {total:,}, {100 * trained / total:.2f} %")
    losses, seconds = train(models, task, args)
    slow = fastlora.peft.fallbacks(models["accelerated"])
    assert set(slow) <= {fastlora.peft.SMALL}  # every call was fused, or too small on a CPU
    small = sum(slow.get(fastlora.peft.SMALL, {}).values())
    print(f"{'accelerated':<12} {small:,} calls left to PEFT's forward, which a CPU runs faster for few tokens")

    answers = {way: task.answer(model.eval()) for way, model in models.items()}
    with tempfile.TemporaryDirectory() as scratch:
        output = args.output or Path(scratch)
        for way, model in models.items():
            save(model, way, output)
        for way in WAYS:
            print(f"{way:<12} {task.figures(answers[way])}, {median(seconds[way] or [0]):.3f} s a step, ", end="")
            check_that_it_falls(losses[way])
        for way in WAYS[1:]:
            apart = max((abs(a - b) for a, b in zip(losses[way], losses["peft"], strict=True)), default=0.0)
            print(f"{way:<12} largest difference from PEFT's loss curve {apart:.1e}")
        command = [sys.executable, script, *argv, "--score", str(output)]
        fresh = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    for way in WAYS:
        compare(way, answers[way], fresh[way])


def adapt(task: Task, way: str, dropout: float) -> nn.Module:
    """A new model with adapters."""
    model = task.build()
    recipe = {
        "target_modules": ["query", "value"],
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": dropout,
        "bias": "all",
        "modules_to_save": ["LayerNorm", task.head],
    }
    if way == "injected":
        return fastlora.inject(model, **recipe)
    model = get_peft_model(model, LoraConfig(**recipe))
    if way == "accelerated":
        report = fastlora.accelerate(model)
        print(report)
        assert report.taken, report
    return model


def save(model: nn.Module, way: str, output: Path) -> None:
    """Adapters, biases, LayerNorms and head, in PEFT's format."""
    fastlora.save_adapter(model, output / way) if way == "injected" else model.save_pretrained(output / way)


def reload(task: Task, way: str, output: Path) -> nn.Module:
    """The model as it was saved."""
    if way == "injected":
        return fastlora.from_pretrained(task.build(), output / way)
    model = PeftModel.from_pretrained(task.build(), output / way)
    if way == "accelerated":
        fastlora.accelerate(model)
    return model


def train(models: dict[str, nn.Module], task: Task, args: argparse.Namespace) -> tuple[dict[str, list[float]], ...]:
    """The losses and the seconds of each step, by way."""
    losses: dict[str, list[float]] = {way: [] for way in models}
    seconds: dict[str, list[float]] = {way: [] for way in models}
    optimizers = {
        way: torch.optim.AdamW((p for p in model.train().parameters() if p.requires_grad), lr=args.lr)
        for way, model in models.items()
    }
    for step, batch in zip(tqdm(range(args.steps), mininterval=5), task.batches(), strict=False):
        for way in sorted(models, reverse=step % 2 == 1):  # none always finds the caches warm
            start, optimizer = time.perf_counter(), optimizers[way]
            torch.manual_seed(step)
            loss = models[way](**batch).loss
            loss.backward()
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            optimizer.step()
            optimizer.zero_grad()
            losses[way].append(loss.item())
            seconds[way].append(time.perf_counter() - start)
    return losses, seconds


def compare(way: str, here: list[Answer], there: list[Answer]) -> None:
    """Exit with an error unless both processes gave the same answers."""
    different = sum(a != b for (a, _), (b, _) in zip(here, there, strict=True))
    apart = max(abs(a - b) for (_, a), (_, b) in zip(here, there, strict=True))
    equal = f"{len(here) - different:,} of {len(here):,} answers equal"
    print(f"{way:<12} reloaded in a fresh process: {equal}, scores at most {apart:.1e} apart")
    if different:
        raise SystemExit(f"{way}: the reloaded model answers differently")
