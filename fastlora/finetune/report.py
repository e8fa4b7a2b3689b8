"""The report: figures and verdicts in one dict, as JSON, as a table in the terminal, and as a plot."""

import os
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from fastlora.cli import common
from fastlora.environment import environment
from fastlora.finetune.check import distance
from fastlora.injection.trainable import get_nb_trainable_parameters

Json = dict[str, Any]
MARK = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]not checked[/]"}


def outcome(before: Tensor, after: Tensor, curve: list[tuple[float, float]], saved_bytes: int) -> Json:
    """The figures of one run, from the losses of each held-out window, (n,), and the loss and the seconds of each step.

    `gain_error` is the standard error of the gain over the windows, `step_seconds` the median.
    """
    gain, (losses, seconds) = before - after, zip(*curve, strict=True)
    means = {"before": before.mean(), "after": after.mean(), "gain": gain.mean(), "gain_error": gain.std() / len(gain) ** 0.5}
    costs = {"step_seconds": statistics.median(seconds), "saved_bytes": saved_bytes}
    return {**{name: float(mean) for name, mean in means.items()}, **costs, "losses": list(losses)}


def assemble(args: Namespace, model: nn.Module, tokens: dict[str, Tensor], outcomes: Json, control: Json | None) -> Json:
    """The report: three verdicts, which decide the exit code, and all that they rest on.  A verdict is None if not checked."""
    trainable, parameters = get_nb_trainable_parameters(model)
    eager, fused = outcomes["eager"]["losses"], outcomes["fused"]["losses"]
    apart = distance(fused, eager)
    learned = all(o["gain"] > 2 * o["gain_error"] for o in outcomes.values())
    gains = ", ".join(f"{name} {o['gain']:+.4f} ± {o['gain_error']:.4f}" for name, o in outcomes.items())
    exact, close, errors, bound = None, None, "not checked", "not checked"
    if control is not None:
        rows, unreached = control["layers"], control["unreached"]
        worst = max(rows, key=lambda row: row["error"] / row["bound"])
        exact, close = all(row["passed"] for row in rows), apart <= control["curve_bound"]
        errors = "{} results, nearest to its bound: {output} of {layer}, {error:.1e} of {bound:.1e}".format(len(rows), **worst)
        errors += f"; not reached: {', '.join(unreached)}" if unreached else ""
        bound = f"bound {control['curve_bound']:.1e}"
    verdicts = (
        ("held-out loss fell by more than two standard errors", learned, gains),
        ("every layer as exact as eager, by float64", exact, errors),
        ("curves no further apart than rounding takes them", close, f"{apart:.1e} apart (root mean square), {bound}"),
    )
    return {
        "passed": False not in (learned, exact, close),
        "verdicts": [dict(zip(("question", "passed", "figures"), verdict, strict=True)) for verdict in verdicts],
        "largest_difference": max(abs(a - b) for a, b in zip(fused, eager, strict=True)),
        "curve_distance": apart,
        "settings": {name: value for name, value in vars(args).items() if name not in ("func", "json")},
        "environment": environment(args.device)
        | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "backend": args.backend},
        "outcomes": outcomes,
        "control": control,
        "trainable": trainable,
        "parameters": parameters,
        "trainable_share": trainable / parameters,
        "tokens": {name: part.numel() for name, part in tokens.items()},
    }


def show(report: Json) -> None:
    """Print the two runs side by side, what they share, the verdicts, and where the files are."""
    settings, machine, outcomes = report["settings"], report["environment"], report["outcomes"]
    share = f"{report['trainable']:,d} ({report['trainable_share']:.2%})"
    rows = (
        ("held-out loss before adapting", *(f"{figures['before']:.4f}" for figures in outcomes.values())),
        ("held-out loss after", *(f"{figures['after']:.4f}" for figures in outcomes.values())),
        ("largest difference of the loss curves", "", f"{report['largest_difference']:.1e}"),
        ("step time, median", *(f"{figures['step_seconds'] * 1e3:.1f} ms" for figures in outcomes.values())),
        ("saved for backward", *(f"{figures['saved_bytes'] / 2**20:.2f} MiB" for figures in outcomes.values())),
        ("trainable parameters", share, share),
    )
    columns = {"": "left", **{f"{name} LoRA": "right" for name in outcomes}}
    console = common.consoles()[0]
    console.print(common.table("The same fine-tuning run, twice", columns, rows))
    work = f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} tokens, {settings['dtype']}"
    where = f"{machine['backend']} backend, {settings['device']}, CPU threads: {machine['threads']}"
    console.print(f"{work}, {where}, {report['seconds']:.0f} s in all.")
    console.print("Both runs use fastlora's dropout masks; `fastlora bench` compares the speed with torch's own dropout.\n")
    for verdict in report["verdicts"]:
        console.print(f"{MARK[verdict['passed']]}  {verdict['question']}\n    {escape(verdict['figures'])}")
    console.print(f"\nloss.png, report.json and the adapter (PEFT's format) are in {escape(str(settings['output']))}")


def plot(report: Json, path: Path) -> None:
    """Write the figure: both loss curves above, their distance and the control's below."""
    from matplotlib.figure import Figure

    eager, fused = report["outcomes"]["eager"], report["outcomes"]["fused"]
    steps = range(1, len(eager["losses"]) + 1)
    figure = Figure(figsize=(10, 6), layout="constrained")
    curves, apart = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves.plot(steps, eager["losses"], color="tab:orange", linewidth=3.5, alpha=0.6, label="eager LoRA")
    curves.plot(steps, fused["losses"], color="tab:blue", linewidth=1.0, label="fused LoRA")
    curves.axhline(fused["before"], color="gray", linestyle=":", label=f"held out, before: {fused['before']:.3f}")
    curves.axhline(fused["after"], color="black", linestyle="--", label=f"held out, after: {fused['after']:.3f}")
    curves.set(title="Fine-tuning with eager and with fused LoRA linears", ylabel="loss (nats per token)")
    for name, other, color in (("fused", fused, "tab:blue"), ("control", report["control"], "tab:green")):
        if other is not None:
            pairs = zip(steps, other["losses"], eager["losses"], strict=True)
            points = {step: abs(a - b) for step, a, b in pairs if a != b}  # a logarithmic axis has no place for 0
            apart.plot(list(points), list(points.values()), color=color, linewidth=1.0, label=f"|{name} − eager|")
    apart.set(yscale="log", xlabel="step", ylabel="distance of the curves")
    curves.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
