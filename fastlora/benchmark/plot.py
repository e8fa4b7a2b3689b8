"""Bars of the medians with whiskers from p20 to p80, one panel for each pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.benchmark.providers import FROZEN
from fastlora.benchmark.trial import PASSES
from fastlora.cli.common import three_digits

GREY, ORANGE, BLUE = "#9aa0a6", "#d98c3f", "#2a6fbb"


def bars(rows: Sequence[Mapping[str, Any]], title: str, conditions: str, path: Path) -> None:
    """Draw the rows of one case, see `results.linear_rows`, to a PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["provider"] for row in rows))
    colours = [BLUE if "fastlora" in name else GREY if name == FROZEN else ORANGE for name in names]
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(names)), layout="constrained")
    for axes, pass_ in zip(figure.subplots(1, len(PASSES), sharey=True), PASSES, strict=True):
        drawn = [row for row in rows if row["pass"] == pass_]
        medians = [row["median_ms"] for row in drawn]
        spread = [[row["median_ms"] - row["p20_ms"] for row in drawn], [row["p80_ms"] - row["median_ms"] for row in drawn]]
        container = axes.barh(names, medians, xerr=spread, capsize=3, color=colours)
        labels = [f"{three_digits(row['median_ms'])} ms, {row['over_frozen']:.2f} ×" for row in drawn]
        axes.bar_label(container, labels, padding=4, fontsize=8)
        axes.set_title(pass_)
        axes.set_xlabel("milliseconds, × frozen linear")
        axes.margins(x=0.45)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # the panels share it
    figure.suptitle(title)
    figure.supxlabel(f"{conditions}; whiskers: 20th to 80th percentile", fontsize=8, color="#5f6368")
    figure.savefig(path, dpi=150)
