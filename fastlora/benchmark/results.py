"""Results as rows, the conditions they hold under, and their files.

A row is one pass of one provider at one size: {"provider", "pass", "median_ms", "p20_ms", "p80_ms", "over_frozen",
"over_eager", "roofline_percent", "launch_ms", "saved_bytes", "peak_bytes"} and the facts of the case.  Bytes stand with
forward + backward, launch_ms (the host's time to launch the pass) on a GPU, roofline_percent where the ceilings were measured;
elsewhere they are None.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import oracle
from fastlora.benchmark.ceilings import Ceilings
from fastlora.benchmark.clock import quantiles
from fastlora.benchmark.trial import PASSES, Measurement

Row = dict[str, Any]

WIDE_SPREAD = 1.5  # p80 / p20; an undisturbed run stays below 1.1


def scattered(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many of the rows have times that scatter widely: something else ran on the machine."""
    return sum(row["p80_ms"] > WIDE_SPREAD * row["p20_ms"] for row in rows)


def rows_of(measurements: Sequence[Measurement], case: oracle.Case, ceilings: Ceilings | None = None) -> list[Row]:
    """One row for each pass of each provider; the first two are the frozen linear and eager LoRA."""
    frozen, eager = measurements[:2]
    rows = []
    for name in PASSES:
        for measurement in measurements:
            p20, median, p80 = measurement.quantiles(name)
            whole = name == PASSES[-1]
            floor = ceilings and ceilings.floor(case, name, adapted=measurement is not frozen)
            launch = measurement.launch_seconds.get(name)
            rows.append(
                {
                    "provider": measurement.provider,
                    "pass": name,
                    "median_ms": median * 1e3,
                    "p20_ms": p20 * 1e3,
                    "p80_ms": p80 * 1e3,
                    "over_frozen": median / frozen.quantiles(name).median,
                    "over_eager": median / eager.quantiles(name).median,
                    "roofline_percent": floor and 100 * floor / median,
                    "launch_ms": quantiles(launch).median * 1e3 if launch else None,
                    "saved_bytes": measurement.saved_bytes if whole else None,
                    "peak_bytes": measurement.peak_bytes if whole else None,
                }
            )
    return rows


def facts_of(case: oracle.Case) -> Row:
    """What distinguishes the case, in plain values."""
    m, k, n = case.shape
    dtypes = {"dtype": _name(case.dtype), "adapter_dtype": _name(case.adapters)}
    return {"M": m, "K": k, "N": n, "r": case.rank, "p": case.dropout_p, **dtypes, "bias": case.bias}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The rows, which need not have the same columns, under the union of their columns."""
    columns = {column: None for row in rows for column in row}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Replace `path` at once: an interrupted run leaves the last whole file."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
