"""Results as rows, and their files.

A row is one pass of one provider at one size, as a dict: "provider", "pass", "median_ms", "p20_ms", "p80_ms", ratios of
medians, "roofline_percent", "launch_ms", "saved_bytes", "peak_bytes", and the facts of the case.  Only the last pass has bytes.
launch_ms, the host's time to launch the pass, is measured on a GPU only.  A value that was not measured is None.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora import atomic, oracle
from fastlora.benchmark.ceilings import Ceilings
from fastlora.benchmark.clock import quantiles
from fastlora.benchmark.providers import EAGER, FROZEN
from fastlora.benchmark.trial import Measurement

WIDE_SPREAD = 1.5  # p80 / p20; an undisturbed run stays below 1.1


def scattered(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows have widely scattered times: something else ran on the machine."""
    return sum(row["p80_ms"] > WIDE_SPREAD * row["p20_ms"] for row in rows)


def rows_of(
    measurements: Sequence[Measurement],
    ratios: Mapping[str, str],
    floor: Callable[[Measurement], float | None] = lambda measurement: None,
) -> list[dict[str, Any]]:
    """One row for each measurement.

    Args:
        ratios: column -> the provider to whose median the column relates.
        floor: the least seconds that the pass can take, for the roofline.
    """
    medians = {(m.provider, m.pass_): quantiles(m.seconds).median for m in measurements}
    rows = []
    for m in measurements:
        p20, median, p80 = quantiles(m.seconds)
        least = floor(m)
        rows.append(
            {"provider": m.provider, "pass": m.pass_, "median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}
            | {column: median / medians[provider, m.pass_] for column, provider in ratios.items()}
            | {"roofline_percent": least and 100 * least / median}
            | {"launch_ms": quantiles(m.launch_seconds).median * 1e3 if m.launch_seconds else None}
            | {"saved_bytes": m.saved_bytes, "peak_bytes": m.peak_bytes}
        )
    return rows


def linear_rows(measurements: Sequence[Measurement], case: oracle.Case, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of a linear, relative to the frozen linear and to eager LoRA, with the facts of the case."""

    def floor(m: Measurement) -> float:
        return ceilings.floor(replace(case, rank=0) if m.provider == FROZEN else case, m.pass_)

    rows = rows_of(measurements, {"over_frozen": FROZEN, "over_eager": EAGER}, floor)
    return [{**facts_of(case), **row} for row in rows]


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
    """The rows, which may have different columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Replace `path` at once: an interrupted run leaves the previous file."""
    atomic.write(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
