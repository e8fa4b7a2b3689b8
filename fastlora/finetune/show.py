"""The report for people: a table in the terminal and a figure of the loss curves."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlora.finetune.report import Report

_BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
MARK = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("not checked", "yellow")}


def print_table(report: Report, console: Console) -> None:
    """Print what was compared, side by side, then what both share, the verdicts and where the files are."""
    outcomes, settings = report.outcomes, report.settings
    table = Table("", title="The same fine-tuning run, twice", title_justify="left")
    for name in outcomes:
        table.add_column(f"{name} LoRA", justify="right")
    share = f"{report.trainable:,d} ({report.trainable / report.parameters:.2%})"
    rows = {
        "held-out loss before adapting": [f"{o.before:.4f}" for o in outcomes.values()],
        "held-out loss after": [f"{o.after:.4f}" for o in outcomes.values()],
        "largest difference of the loss curves": ["", f"{report.largest_difference:.1e}"],
        "step time, median": [f"{o.step_seconds * 1e3:.1f} ms" for o in outcomes.values()],
        "saved for backward": [f"{o.saved_bytes / 2**20:.2f} MiB" for o in outcomes.values()],
        "trainable parameters": [share] * len(outcomes),
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    verdicts = Table.grid(padding=(0, 2))
    for verdict in report.verdicts:
        word, style = MARK[verdict.passed]
        verdicts.add_row(Text(word, style=style), f"{verdict.question}\n{verdict.figures}")
    console.print("", table, sep="\n")
    console.print(
        f"{settings.steps} steps of {settings.batch_size} × {settings.seq_len} tokens, {settings.dtype}, "
        f"{report.environment['backend']} backend, {settings.device}, CPU threads: {report.environment['threads']}, "
        f"{report.seconds:.0f} s in all.\n"
        "Both runs draw the mask with fastlora's generator, to see the same one; for speed beside torch's own dropout see "
        "fastlora bench.\n"
    )
    console.print(verdicts)
    console.print(f"\nloss.png, report.json and the adapter (PEFT's format) are in {settings.output}")


def plot(report: Report, path: Path) -> None:
    """Write the figure: both loss curves above, their distance and the control's below."""
    from matplotlib.figure import Figure

    eager, fused = (report.outcomes[name] for name in ("eager", "fused"))
    steps = range(1, report.settings.steps + 1)
    figure = Figure(figsize=(10, 6), layout="constrained")
    curves, apart = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves.plot(steps, eager.losses, color="tab:orange", linewidth=3.5, alpha=0.6, label="eager LoRA")
    curves.plot(steps, fused.losses, color="tab:blue", linewidth=1.0, label="fused LoRA")
    curves.axhline(fused.before, color="gray", linestyle=":", label=f"held out, before: {fused.before:.3f}")
    curves.axhline(fused.after, color="black", linestyle="--", label=f"held out, after: {fused.after:.3f}")
    curves.set_ylabel("loss (nats per token)")
    curves.set_title("Fine-tuning with eager and with fused LoRA linears")
    curves.legend(**_BESIDE)
    _distance(apart, steps, fused.losses, eager.losses, color="tab:blue", label="|fused − eager|")
    if report.control is not None:
        _distance(apart, steps, report.control.losses, eager.losses, color="tab:green", label="|control − eager|")
    apart.set_yscale("log")
    apart.set_xlabel("step")
    apart.set_ylabel("distance of the curves")
    apart.legend(**_BESIDE)
    figure.savefig(path, dpi=120)


def _distance(axes: Any, steps: range, curve: list[float], other: list[float], **style: Any) -> None:
    """Steps at which the curves coincide have no place on a logarithmic axis."""
    apart = {step: abs(a - b) for step, a, b in zip(steps, curve, other, strict=True) if a != b}
    axes.plot(list(apart), list(apart.values()), linewidth=1.0, **style)
