"""`python -m benches.report`: README's tables and the plots from the files in benches/results.

Of each device the file with the most rows counts, of a GPU as of a CPU; where no GPU was measured the README says so.
Everything between the two markers in README.md is replaced.  With --check nothing is written, and the exit code is 1 when
README.md is not what the files say.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.benchmark import PASSES, results
from fastlora.benchmark.plot import three_digits

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- python -m benches.report writes from here -->", "<!-- to here -->"
COMMAND = "pytest benches --benchmark-only"
OVERVIEW = ("frozen linear", "PEFT", "chained addmm_", "fastlora fused", "fastlora prefill", "fastlora")

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
            f"**Speed on a GPU has not been measured yet.** `{COMMAND}` measures it on yours within 8 minutes,\n"
            "with `--quick` within 2; `python -m benches.report` then writes the tables here."
        )
    for path, run in runs.items():
        parts += _of_run(path, run)
    return "\n\n".join(parts)


def _of_run(path: Path, run: Run) -> list[str]:
    """Conditions, the first sizes in full, every linear in short, and the models."""
    linears = _by_id([row for row in run["rows"] if row["kind"] == "linear"])
    models = [row for row in run["rows"] if row["kind"] != "linear"]
    shown = list(linears.values())[: 1 if "driver" in run["facts"] else 2]
    parts = [_conditions(run), *(_in_full(rows) for rows in shown)]
    if shown:
        parts.append(f"![times of every contender](benches/results/{path.with_suffix('.png').name})")
    if len(linears) > len(shown):
        parts.append(_in_short(list(linears.values())))
    if models:
        parts.append(_of_models(models))
    return parts


def _by_id(rows: Sequence[results.Row]) -> dict[str, list[results.Row]]:
    found: dict[str, list[results.Row]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def _conditions(run: Run) -> str:
    facts = run["facts"]
    names = ("driver", "cuda", "torch", "triton", "peft", "commit", "tuned", "date", "threads")
    known = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name) is not None)
    ceilings = "; ".join(
        f"{dtype}: matrix product {three_digits(rates['gemm_tflops'])} TFLOP/s, copy {three_digits(rates['copy_gbps'])} GB/s"
        for dtype, rates in run["ceilings"].items()
    )
    measured = f" Measured in the same run, {ceilings}." if ceilings else ""
    return f"**{facts['device']}** ({known}).{measured}"


def _in_full(rows: Sequence[results.Row]) -> str:
    """One size: every contender and pass."""
    header = [
        "contender",
        *(f"{pass_}, ms" for pass_ in PASSES),
        "p20 to p80",
        "× frozen",
        "% of roofline",
        "saved, MiB",
        "peak, MiB",
    ]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        passes = [next(row for row in rows if (row["contender"], row["pass"]) == (name, pass_)) for pass_ in PASSES]
        whole = passes[-1]
        lines.append(
            [
                name,
                *(three_digits(row["median_ms"]) for row in passes),
                f"{three_digits(whole['p20_ms'])} to {three_digits(whole['p80_ms'])}",
                f"{whole['over_frozen']:.2f}",
                f"{whole['roofline_percent']:.0f}",
                *(three_digits(whole[key] / 2**20) for key in ("saved_bytes", "peak_bytes")),
            ]
        )
    return f"{_title(rows[0])}; the last columns are of forward + backward:\n\n{_table(header, lines)}"


def _in_short(sizes: Sequence[Sequence[results.Row]]) -> str:
    """Every size: forward + backward over the frozen linear's."""
    present = {row["contender"] for rows in sizes for row in rows}
    names = [name for name in OVERVIEW[1:] if name in present]
    lines = []
    for rows in sizes:
        whole = {row["contender"]: row for row in rows if row["pass"] == PASSES[-1]}
        frozen = three_digits(whole["frozen linear"]["median_ms"])
        ratios = [f"{whole[name]['over_frozen']:.2f}" if name in whole else "" for name in names]
        lines.append([rows[0]["used_by"], _title(rows[0]), frozen, *ratios])
    header = ["linear", "size", "frozen, ms", *(f"{name}, ×" for name in names)]
    return f"Forward + backward of every size, over the frozen linear's:\n\n{_table(header, lines)}"


def _of_models(rows: Sequence[results.Row]) -> str:
    header = ["", "pass", "contender", "median, ms", "p20 to p80", "× PEFT"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["kind"], PASSES.index(row["pass"]) if row["pass"] in PASSES else 0)):
        spread = f"{three_digits(row['p20_ms'])} to {three_digits(row['p80_ms'])}"
        what = f"{row['kind']}, {row['used_by']}, {row['M']} tokens, {row['dtype']}"
        lines.append([what, row["pass"], row["contender"], three_digits(row["median_ms"]), spread, f"{row['over_eager']:.2f}"])
    return f"Whole models, adapters on every linear:\n\n{_table(header, lines)}"


def _title(row: results.Row) -> str:
    adapters = f" with {row['adapter_dtype']} adapters" if row["adapter_dtype"] != row["dtype"] else ""
    bias = ", bias" if row["bias"] else ""
    return f"M={row['M']} K={row['K']} N={row['N']} r={row['r']} p={row['p']:g}, {row['dtype']}{adapters}{bias}"


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
