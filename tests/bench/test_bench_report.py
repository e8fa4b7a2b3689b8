"""`python -m benches.report`: the tables and sentences that it makes of a run, and the committed page as it is."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from fastlora.cli.common import three_digits

Benches = dict[str, ModuleType]
ToyRun = tuple[Path, dict, dict]
BOTH = "forward + backward"


def cells(text: str, heading: str, line: str) -> dict[str, str]:
    """By column, the line of the first table whose header begins with `heading`."""
    table = text[text.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()
    header, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    return dict(zip(header, next(row for row in rows if row[0] == line), strict=True))


def test_the_report(toy_run: ToyRun, benches: Benches) -> None:
    folder, own, _ = toy_run
    report, page = benches["report"], folder / "README.md"
    arguments = ["--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert not page.exists()
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    assert list(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    text = page.read_text()
    assert "**Speed on a GPU has not been measured yet.** `pytest benches --benchmark-only" in text
    copy = three_digits(own["ceilings"]["float32"]["copy_gbps"])
    assert f"copy {copy} GB/s.\nThe roofline is the least time" in text

    rows = {(row["kind"], row["provider"], row["pass"]): row for row in own["rows"][::-1]}
    row, line = rows["linear", "PEFT", BOTH], cells(text, "provider", "PEFT")
    assert line["× frozen"] == f"{row['over_frozen']:.2f}"
    assert line[f"{BOTH}, ms"] == three_digits(row["median_ms"])
    assert line["peak, MiB"] == three_digits(row["peak_bytes"] / 2**20)
    row, line = (
        rows["training step", "fastlora", "training step"],
        cells(text[text.index("Training step,") :], "provider", "fastlora"),
    )
    assert line["training step, ms"] == three_digits(row["median_ms"])
    assert (line["× PEFT"], line["peak, MiB"]) == (f"{row['over_eager']:.2f}", three_digits(row["peak_bytes"] / 2**20))

    page.write_text(text + "a change by hand\n")
    assert report.main([*arguments, "--check"]) == 1


def test_the_report_of_a_gpu(toy_run: ToyRun, benches: Benches, tmp_path: Path) -> None:
    _, own, _ = toy_run
    report = benches["report"]
    rows = [{**row, "launch_ms": 0.1 * (1 + index)} for index, row in enumerate(own["rows"])]
    linears = [row for row in rows if row["kind"] == "linear"]
    more = [{**row, "id": f"{row['id']}-{copy}", "used_by": "a model"} for copy in range(report.LISTED) for row in linears]
    facts = {**own["facts"], "device": "a GPU", "driver": "1"}
    gpu = {"facts": facts, "ceilings": {}, "rows": [*rows, *more], "not_reached": ["a size", "training step"]}
    (tmp_path / "cpu.json").write_text(json.dumps(own))
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    (tmp_path / "fewer.json").write_text(json.dumps({**gpu, "rows": []}))
    shown = report.text(report.load(tmp_path))
    assert "has not been measured" not in shown
    assert f"the next {report.LISTED} of {1 + 2 * report.LISTED} other sizes, over the frozen linear's" in shown
    assert shown.count("| a model |") == report.LISTED - 1  # the first of them is the second size of the suite

    _, of_gpu, of_cpu = re.split(r"^\*\*(?=a GPU|" + re.escape(own["facts"]["device"]) + ")", shown, flags=re.MULTILINE)
    assert report.HOST in of_gpu
    assert "host" not in of_cpu.lower()
    launch = {(row["id"], row["pass"], row["provider"]): three_digits(row["launch_ms"]) for row in rows}
    first, second = "f32-96x64x80-r8-p0.1", "f32-96x64x80-r8-p0"
    assert cells(of_gpu, "provider", "PEFT")["host, ms"] == launch[first, BOTH, "PEFT"]
    for kind, pass_ in (("Decoder layer", BOTH), ("Training step", "training step")):
        table = of_gpu[of_gpu.index(f"{kind}, Llama") :]
        assert cells(table, "provider", "fastlora")["host, ms"] == launch[kind.lower(), pass_, "fastlora"]
    short = cells(of_gpu, "size", "M=96 K=64 N=80 r=8 p=0, float32")
    for name in ("PEFT", "fastlora"):
        assert short[f"{name}, host ms"] == launch[second, BOTH, name]


@pytest.mark.parametrize("left", [[], ["f32-1x2x3-r4-p0", "decoder layer", "training step"]], ids=["whole", "cut"])
def test_the_report_says_what_a_cut_run_did_not_reach(
    left: list[str], toy_run: ToyRun, benches: Benches, tmp_path: Path
) -> None:
    _, own, _ = toy_run
    rows = [row for row in own["rows"] if row["id"] not in left]
    (tmp_path / "cut.json").write_text(json.dumps({**own, "rows": rows, "not_reached": left}))
    shown = benches["report"].text(benches["report"].load(tmp_path))
    assert ("The time budget ended after 2 sizes; 3 were not reached" in shown) == bool(left)
    assert ("not reached" in shown) == bool(left)


def test_the_report_says_what_the_grid_is(benches: Benches) -> None:
    grid, text = benches["grid"], benches["report"].text({}).replace("\n", " ")
    assert "does not have every combination; `--grid everything` does" in text
    assert f"every M from {min(grid.ROWS)} on" in text
    assert "M = {}, {} and {}.".format(*grid.FEW_ROWS) in text


def test_the_committed_page_shows_the_committed_results(benches: Benches) -> None:
    assert benches["report"].main(["--check"]) == 0
