"""`python -m benches.report`: write README.md and the plots beside the results, from the JSON files there.

Of each device the file with the most rows is used.  Where no GPU was measured README.md says so.  With --check nothing is
written, and the exit code is 1 when README.md does not match the files.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.setting import PASSES_OF
from fastlora.benchmark import PASSES, results
from fastlora.benchmark.providers import FROZEN
from fastlora.cli.common import three_digits

RESULTS = Path(__file__).parent / "results"
OVERVIEW = ("PEFT", "chained addmm_", "fastlora fused", "fastlora addmm", "fastlora")
LAUNCHED = ("PEFT", "fastlora")  # whose host time the short table shows
LISTED = 10  # sizes in the short table; a grid begins with the most important ones
HEAD = """\
# Results

Written by `python -m benches.report`. [The benchmarks' README](../README.md) explains providers and columns."""
NO_GPU = """\
**Speed on a GPU has not been measured yet.** `pytest benches --benchmark-only --results benches/results` measures it on yours
in about 8 minutes, with `--quick` in 2. `python -m benches.report` then writes the tables here."""
GRIDS = """\
On a GPU the default grid does not have every combination; `--grid everything` does. Every linear is measured at every M from
512 on. One of them is measured at every r, p and dtype of the adapters, and at M = 1, 16 and 128."""
ROOFLINE = "The roofline is the least time that these rates allow; passes with faster products than the one above exceed 100 %."
HOST = '"Host" is how long the CPU took to launch the pass; all other times are the device\'s.'

Run = dict[str, Any]
Measured = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md and the plots, or check; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benches.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when README.md is not up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: benches/results)")
    args = parser.parse_args(argv)
    runs, readme = load(args.results), args.results / "README.md"
    page = text(runs)
    if args.check:
        current = readme.exists() and readme.read_text() == page
        if not current:
            print(f"{readme} does not match the results beside it: run python -m benches.report", file=sys.stderr)
        return 0 if current else 1
    readme.write_text(page)
    for path, run in runs.items():
        for rows in sizes_of(run, "linear")[:1]:
            conditions = f"{run['facts']['device']}, torch {run['facts']['torch']}"
            results.plot(rows, conditions, path.with_suffix(".png"))
    return 0


def load(folder: Path) -> dict[Path, Run]:
    """The results by file: of each device the file with the most rows, GPUs first."""
    runs = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    best = {run["facts"]["device"]: path for path, run in sorted(runs.items(), key=lambda item: len(item[1]["rows"]))}
    return {path: runs[path] for path in sorted(best.values(), key=lambda path: ("driver" not in runs[path]["facts"], path))}


def text(runs: Mapping[Path, Run]) -> str:
    """The page in Markdown."""
    on_gpu = any("driver" in run["facts"] for run in runs.values())
    parts = [HEAD, *([] if on_gpu else [NO_GPU]), GRIDS]
    for path, run in runs.items():
        parts.append(_conditions(path, run))
        linears = sizes_of(run, "linear")
        parts += [_in_full(rows) for rows in linears[:1]]
        parts += [_in_short(linears[1:])] if linears[1:] else []
        parts += [_of_model(rows) for kind in PASSES_OF for rows in sizes_of(run, kind)]
    return "\n\n".join(parts) + "\n"


def sizes_of(run: Run, kind: str) -> list[list[Measured]]:
    """The rows of each size of a kind."""
    found: dict[str, list[Measured]] = {}
    for row in run["rows"]:
        if row["kind"] == kind:
            found.setdefault(row["id"], []).append(row)
    return list(found.values())


def _conditions(path: Path, run: Run) -> str:
    facts, left, done = run["facts"], len(run["not_reached"]), len({row["id"] for row in run["rows"]})
    names = ("driver", "cuda", "torch", "triton", "peft", "commit", "tuned", "date", "threads")
    known = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name) is not None)
    rates = "; ".join(
        f"{dtype}: matrix product {three_digits(rate['gemm_tflops'])} TFLOP/s, copy {three_digits(rate['copy_gbps'])} GB/s"
        for dtype, rate in run["ceilings"].items()
    )
    cut = f"The time budget ended after {done} sizes; {left} were not reached, counting blocks and models."
    lines = [
        f"**{facts['device']}** ({known}).",
        f"Measured in the same run, {rates}.\n{ROOFLINE}" if rates else "",
        f"Times are medians. All rows: [csv]({path.stem}.csv). The first size: [plot]({path.stem}.png).",
        HOST if _launched(run["rows"]) else "",
        cut if left else "",
    ]
    return "\n".join(line for line in lines if line)


def _launched(rows: Sequence[Measured]) -> bool:
    """Whether the host's time was measured: on a GPU."""
    return any(row.get("launch_ms") is not None for row in rows)


def _in_full(rows: Sequence[Measured]) -> str:
    """One size: every provider and pass."""
    columns: dict[str, Callable[[Measured], str]] = {
        "× frozen": lambda row: f"{row['over_frozen']:.2f}",
        "% of roofline": lambda row: f"{row['roofline_percent']:.0f}",
        "saved, MiB": lambda row: three_digits(row["saved_bytes"] / 2**20),
    }
    return f"{results.title(rows[0])}; the columns from p20 on are of {PASSES[-1]}:\n\n{_by_provider(rows, columns)}"


def _of_model(rows: Sequence[Measured]) -> str:
    """A block, a decoder layer or a training step: every provider and pass."""
    row = rows[0]
    columns: dict[str, Callable[[Measured], str]] = {"× PEFT": lambda row: f"{row['over_eager']:.2f}"}
    if "over_frozen" in row:  # older results lack it
        columns = {"× frozen": lambda row: f"{row['over_frozen']:.2f}", **columns}
    if any(row.get("saved_bytes") is not None for row in rows):
        columns["saved, MiB"] = lambda row: three_digits(row["saved_bytes"] / 2**20)
    what = f"{row['kind'].capitalize()}, {row['used_by']}, {row['M']} tokens, r={row['r']} p={row['p']:g}"
    table = _by_provider(rows, columns)
    return f"{what}, {results.dtypes_of(row)}, an adapter on every linear:\n\n{table}"


def _by_provider(rows: Sequence[Measured], columns: Mapping[str, Callable[[Measured], str]]) -> str:
    """A line for each provider: the medians of its passes, then what `columns` say of the last pass, the peak and host time."""
    columns = {**columns, "peak, MiB": lambda row: three_digits(row["peak_bytes"] / 2**20)}
    if any(row.get("launches") is not None for row in rows):  # older results lack it, and compiled providers on a CPU
        columns["launches"] = lambda row: str(row["launches"] or "")
    if _launched(rows):
        columns = {"host, ms": lambda row: three_digits(row["launch_ms"]), **columns}
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        found = {row["pass"]: row for row in rows if row["provider"] == name}
        last = found[passes[-1]]
        spread = f"{three_digits(last['p20_ms'])} to {three_digits(last['p80_ms'])}"
        medians = [three_digits(found[pass_]["median_ms"]) for pass_ in passes]
        lines.append([name, *medians, spread, *(column(last) for column in columns.values())])
    return _table(["provider", *(f"{pass_}, ms" for pass_ in passes), "p20 to p80", *columns], lines)


def _in_short(sizes: Sequence[Sequence[Measured]]) -> str:
    """A line for each of the first LISTED sizes: forward + backward over the frozen linear's."""
    listed = sizes[:LISTED]
    present = {row["provider"] for rows in listed for row in rows}
    names = [name for name in OVERVIEW if name in present]
    launched = [name for name in LAUNCHED if name in present and _launched(listed[0])]
    users = any(rows[0]["used_by"] for rows in listed)
    lines = []
    for rows in listed:
        whole = {row["provider"]: row for row in rows if row["pass"] == PASSES[-1]}
        ratios = [f"{whole[name]['over_frozen']:.2f}" if name in whole else "" for name in names]
        hosts = [three_digits(whole[name]["launch_ms"]) if name in whole else "" for name in launched]
        frozen = three_digits(whole[FROZEN]["median_ms"])
        lines.append([results.title(rows[0]), frozen, *ratios, *hosts, *([rows[0]["used_by"]] if users else [])])
    header = ["size", "frozen, ms", *(f"{name}, ×" for name in names), *(f"{name}, host ms" for name in launched)]
    which = "the other sizes" if len(listed) == len(sizes) else f"the next {len(listed)} of {len(sizes)} other sizes"
    table = _table([*header, *(["linear of"] if users else [])], lines)
    return f"Forward + backward of {which}, over the frozen linear's:\n\n{table}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))


if __name__ == "__main__":
    raise SystemExit(main())
