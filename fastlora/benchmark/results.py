"""The rows of a linear: their facts, their CSV file, their plot."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora import oracle
from fastlora.benchmark.ceilings import Ceilings
from fastlora.benchmark.providers import FROZEN
from fastlora.benchmark.trial import PASSES
from fastlora.cli.common import three_digits

WIDE_SPREAD = 1.5  # p80 / p20; an undisturbed run stays below 1.1
GREY, ORANGE, BLUE = "#9aa0a6", "#d98c3f", "#2a6fbb"


def scattered(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows have widely scattered times: something else ran on the machine."""
    return sum(row["p80_ms"] > WIDE_SPREAD * row["p20_ms"] for row in rows)


def linear_rows(rows: Iterable[Mapping[str, Any]], case: oracle.Case, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of `trial.run` with the facts of the case, and "roofline_percent": the least time, in percent of the median."""
    found = []
    for row in rows:
        least = ceilings.floor(replace(case, rank=0) if row["provider"] == FROZEN else case, row["pass"])
        found.append({**facts_of(case), **row, "roofline_percent": 100 * least * 1e3 / row["median_ms"]})
    return found


def facts_of(case: oracle.Case) -> dict[str, Any]:
    """What distinguishes the case, in plain values."""
    m, k, n = case.shape
    dtypes = {"dtype": str(case.dtype).removeprefix("torch."), "adapter_dtype": str(case.adapters).removeprefix("torch.")}
    return {"M": m, "K": k, "N": n, "r": case.rank, "p": case.dropout_p, **dtypes, "bias": case.bias}


def title(facts: Mapping[str, Any]) -> str:
    """The facts of a case, or of a row, in words."""
    bias = ", bias" if facts["bias"] else ""
    return f"M={facts['M']} K={facts['K']} N={facts['N']} r={facts['r']} p={facts['p']:g}, {dtypes_of(facts)}{bias}"


def dtypes_of(facts: Mapping[str, Any]) -> str:
    """The dtype, and the adapters' where it differs."""
    other = f" with {facts['adapter_dtype']} adapters" if facts["adapter_dtype"] != facts["dtype"] else ""
    return facts["dtype"] + other


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows, which may have different columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Mapping[str, Any]], conditions: str, path: Path) -> None:
    """Draw the `linear_rows` of one case to a PNG: bars of the medians with whiskers from p20 to p80, a panel for each pass."""
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
        axes.set(title=pass_, xlabel="milliseconds, × frozen linear")
        axes.margins(x=0.45)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # the panels share it
    figure.suptitle(f"LoRA linear, {title(rows[0])}")
    figure.supxlabel(f"{conditions}; whiskers: 20th to 80th percentile", fontsize=8, color="#5f6368")
    figure.savefig(path, dpi=150)
