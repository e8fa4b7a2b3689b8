"""`python -m benches.report`: README's tables and the plots from the files in benches/results.

Of each device the file with the most rows counts; where no GPU was measured README says so.
Everything between the two markers in README.md is replaced.  With --check nothing is written, and the exit code is 1 when
README.md is not what the files say.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastlora.benchmark import PASSES, results
from fastlora.benchmark.plot import three_digits

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- python -m benches.report writes from here -->", "<!-- to here -->"
COMMAND = "pytest benches --benchmark-only"
OVERVIEW = ("frozen linear", "PEFT", "chained addmm_", "fastlora fused", "fastlora addmm", "fastlora")
LAUNCHED = ("PEFT", "fastlora")  # whose host time the short table shows
LISTED = 10  # sizes in the short table; a grid begins with the most telling ones, the grid quick has no more
GRIDS = (
    "On a GPU the default grid is not the whole product, as `--grid everything` is: every linear is measured at every M\n"
    "from 512 on, but only one of them at every r, p and dtype of the adapters, and at M = 1, 16 and 128."
)
ROOFLINE = "The roofline is the least time that these rates allow; passes with faster products than the one above exceed 100 %."
HOST = 'All are of the device but "host": how long the CPU took to launch the same pass, which decides where it is the longer.'

Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md and the plots, or check; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benches.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when README.md is not up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    args = parser.parse_args(argv)
    runs = load(args.results)
    before = args.readme.read_text()
    after = replaced(before, text(runs))
    if args.check:
        if before != after:
            print(f"{args.readme} does not show what is in {args.results}: run python -m benches.report", file=sys.stderr)
        return int(before != after)
    args.readme.write_text(after)
    for path, run in runs.items():
        _plot(run, path.with_suffix(".png"))
    return 0


def load(folder: Path) -> dict[Path, Run]:
    """The results by file: of each device the file with the most rows, GPUs first."""
    best: dict[str, tuple[Path, Run]] = {}
    for path in sorted(folder.glob("*.json")):
        run = results.read_json(path) or {}
        known = best.get(run["facts"]["device"])
        if known is None or len(run["rows"]) > len(known[1]["rows"]):
            best[run["facts"]["device"]] = path, run
    return dict(sorted(best.values(), key=lambda item: ("driver" not in item[1]["facts"], item[0].name)))


def replaced(readme: str, block: str) -> str:
    """README with `block` between the markers.

    Raises:
        ValueError: it does not hold each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN!r} and after it {END!r}, each once")
    return readme[: readme.index(BEGIN) + len(BEGIN)] + f"\n\n{block}\n\n" + readme[readme.index(END) :]


def text(runs: dict[Path, Run]) -> str:
    """The block in Markdown."""
    parts = []
    if not any("driver" in run["facts"] for run in runs.values()):
        parts.append(
            f"**Speed on a GPU has not been measured yet.** `{COMMAND}` measures it on yours and begins no size after\n"
            "8 minutes, with `--quick` after 2; `python -m benches.report` then writes the tables here."
        )
    parts.append(GRIDS)
    for path, run in runs.items():
        parts += _of_run(path, run)
    return "\n\n".join(parts)


def _of_run(path: Path, run: Run) -> list[str]:
    """Conditions, the first size in full, the next ones in short, and the models."""
    linears = list(_by_id([row for row in run["rows"] if row["kind"] == "linear"]).values())
    models = _by_id([row for row in run["rows"] if row["kind"] != "linear"]).values()
    parts = [_conditions(path, run), *(_in_full(rows) for rows in linears[:1])]
    if len(linears) > 1:
        parts.append(_in_short(linears[1:]))
    return [*parts, *(_of_model(rows) for rows in models)]


def _by_id(rows: Sequence[results.Row]) -> dict[str, list[results.Row]]:
    found: dict[str, list[results.Row]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def _conditions(path: Path, run: Run) -> str:
    facts = run["facts"]
    names = ("driver", "cuda", "torch", "triton", "peft", "commit", "tuned", "date", "threads")
    known = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name) is not None)
    ceilings = "; ".join(
        f"{dtype}: matrix product {three_digits(rates['gemm_tflops'])} TFLOP/s, copy {three_digits(rates['copy_gbps'])} GB/s"
        for dtype, rates in run["ceilings"].items()
    )
    table, plot = (f"benches/results/{path.stem}.{suffix}" for suffix in ("csv", "png"))
    lines = [
        f"**{facts['device']}** ({known}).",
        f"Measured in the same run, {ceilings}.\n{ROOFLINE}" if ceilings else "",
        f"Times are medians. All rows: [csv]({table}). The first size: [plot]({plot}).",
        HOST if _launched(run["rows"]) else "",
        _not_reached(run),
    ]
    return "\n".join(line for line in lines if line)


def _not_reached(run: Run) -> str:
    """Where a run was cut: a sentence; nothing where it was not."""
    left, done = len(run["not_reached"]), len(_by_id(run["rows"]))
    cut = f"The time budget ended after {done} sizes; {left} were not reached, decoder layer and training step counted."
    return cut if left else ""


def _launched(rows: Sequence[results.Row]) -> bool:
    """Whether the host's time was taken: on a GPU."""
    return any(row.get("launch_ms") is not None for row in rows)


def _in_full(rows: Sequence[results.Row]) -> str:
    """One size: every provider and pass."""
    columns = {
        "× frozen": lambda row: f"{row['over_frozen']:.2f}",
        "% of roofline": lambda row: f"{row['roofline_percent']:.0f}",
        "saved, MiB": lambda row: _mib(row["saved_bytes"]),
        "peak, MiB": lambda row: _mib(row["peak_bytes"]),
    }
    return f"{_title(rows[0])}; the columns from p20 on are of {PASSES[-1]}:\n\n{_by_provider(rows, columns)}"


def _of_model(rows: Sequence[results.Row]) -> str:
    """A decoder layer or a training step: every provider and pass."""
    columns = {"× PEFT": lambda row: f"{row['over_eager']:.2f}", "peak, MiB": lambda row: _mib(row["peak_bytes"])}
    first = rows[0]
    what = f"{first['kind'].capitalize()}, {first['used_by']}, {first['M']} tokens, r={first['r']} p={first['p']:g}"
    return f"{what}, {_dtypes(first)}, an adapter on every linear:\n\n{_by_provider(rows, columns)}"


def _by_provider(rows: Sequence[results.Row], columns: dict[str, Callable[[results.Row], str]]) -> str:
    """A line for each provider: the medians of its passes, then the host's time and what `columns` say of the last pass."""
    if _launched(rows):
        columns = {"host, ms": lambda row: three_digits(row["launch_ms"]), **columns}
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        found = [next(row for row in rows if (row["provider"], row["pass"]) == (name, pass_)) for pass_ in passes]
        spread = f"{three_digits(found[-1]['p20_ms'])} to {three_digits(found[-1]['p80_ms'])}"
        more = [column(found[-1]) for column in columns.values()]
        lines.append([name, *(three_digits(row["median_ms"]) for row in found), spread, *more])
    return _table(["provider", *(f"{pass_}, ms" for pass_ in passes), "p20 to p80", *columns], lines)


def _in_short(sizes: Sequence[Sequence[results.Row]]) -> str:
    """A line for each size, the first LISTED of them: forward + backward over the frozen linear's."""
    listed = sizes[:LISTED]
    present = {row["provider"] for rows in listed for row in rows}
    names = [name for name in OVERVIEW[1:] if name in present]
    launched = [name for name in LAUNCHED if name in present and _launched(listed[0])]
    lines = []
    for rows in listed:
        whole = {row["provider"]: row for row in rows if row["pass"] == PASSES[-1]}
        frozen = three_digits(whole["frozen linear"]["median_ms"])
        ratios = [f"{whole[name]['over_frozen']:.2f}" if name in whole else "" for name in names]
        hosts = [three_digits(whole[name]["launch_ms"]) if name in whole else "" for name in launched]
        lines.append([_title(rows[0]), frozen, *ratios, *hosts, rows[0]["used_by"]])
    header = ["size", "frozen, ms", *(f"{name}, ×" for name in names), *(f"{name}, host ms" for name in launched), "linear of"]
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    which = "the other sizes" if len(listed) == len(sizes) else f"the next {len(listed)} of {len(sizes)} other sizes"
    return f"Forward + backward of {which}, over the frozen linear's:\n\n{_table(header, lines)}"


def _mib(size: float | None) -> str:
    return "" if size is None else three_digits(size / 2**20)


def _title(row: results.Row) -> str:
    bias = ", bias" if row["bias"] else ""
    return f"M={row['M']} K={row['K']} N={row['N']} r={row['r']} p={row['p']:g}, {_dtypes(row)}{bias}"


def _dtypes(row: results.Row) -> str:
    return row["dtype"] + (f" with {row['adapter_dtype']} adapters" if row["adapter_dtype"] != row["dtype"] else "")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plot(run: Run, path: Path) -> None:
    """The first size of the run."""
    from fastlora.benchmark import plot

    linears = list(_by_id([row for row in run["rows"] if row["kind"] == "linear"]).values())
    if linears:
        plot.bars(linears[0], _title(linears[0][0]), f"{run['facts']['device']}, torch {run['facts']['torch']}", path)


if __name__ == "__main__":
    raise SystemExit(main())
