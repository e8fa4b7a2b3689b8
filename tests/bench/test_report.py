"""`python -m benches.report`: the page that it writes of a run, and the committed page."""

import json
import re

from benches import grid, report
from fastlora.cli.common import three_digits

BOTH, STEP = "forward + backward", "training step"


def cells(text, after, line):
    """By column, the line of the first table after the words `after`."""
    table = re.search(r"^\|.*?(?=\n\n|\Z)", text[text.index(after) :], re.DOTALL | re.MULTILINE)[0].splitlines()
    header, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    return dict(zip(header, next(row for row in rows if row[0] == line), strict=True))


def test_the_page_of_a_run(toy_run):
    folder, own, _ = toy_run
    page, arguments = folder / "README.md", ["--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert not page.exists()
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    (plot,) = folder.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "**Speed on a GPU has not been measured yet.** `pytest benches --benchmark-only" in text
    copy = three_digits(own["ceilings"]["float32"]["copy_gbps"])
    assert f"copy {copy} GB/s.\nThe roofline is the least time" in text
    assert "not reached" not in text

    rows = {(row["kind"], row["provider"], row["pass"]): row for row in own["rows"][::-1]}
    row, line = rows["linear", "PEFT", BOTH], cells(text, "M=96", "PEFT")
    assert line["× frozen"] == f"{row['over_frozen']:.2f}"
    assert line[f"{BOTH}, ms"] == three_digits(row["median_ms"])
    assert line["peak, MiB"] == three_digits(row["peak_bytes"] / 2**20)
    row, line = rows[STEP, "fastlora", STEP], cells(text, "Training step,", "fastlora")
    assert line[f"{STEP}, ms"] == three_digits(row["median_ms"])
    assert (line["× PEFT"], line["peak, MiB"]) == (f"{row['over_eager']:.2f}", three_digits(row["peak_bytes"] / 2**20))

    page.write_text(text + "a change by hand\n")
    assert report.main([*arguments, "--check"]) == 1


def test_the_page_of_a_gpu(toy_run, tmp_path):
    """Of two runs on one GPU it shows the longer one; only there it has the host's times."""
    _, own, _ = toy_run
    rows = [{**row, "launch_ms": 0.1 * (1 + index)} for index, row in enumerate(own["rows"])]
    linears = [row for row in rows if row["kind"] == "linear"]
    more = [{**row, "id": f"{row['id']}-{copy}", "used_by": "a model"} for copy in range(report.LISTED) for row in linears]
    facts = {**own["facts"], "device": "a GPU", "driver": "1"}
    gpu = {"facts": facts, "ceilings": {}, "rows": [*rows, *more], "not_reached": ["a size", STEP]}
    for name, run in (("cpu", own), ("gpu", gpu), ("fewer", {**gpu, "rows": []})):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    shown = report.text(report.load(tmp_path))
    assert "has not been measured" not in shown
    assert f"the next {report.LISTED} of {1 + 2 * report.LISTED} other sizes, over the frozen linear's" in shown
    assert shown.count("| a model |") == report.LISTED - 1  # the first of them is the second size of the suite

    of_gpu, _, of_cpu = shown[shown.index("**a GPU") :].partition(f"**{own['facts']['device']}")
    assert report.HOST in of_gpu
    assert "host" not in of_cpu.lower()
    launch = {(row["id"], row["pass"], row["provider"]): three_digits(row["launch_ms"]) for row in rows}
    first, second = grid.sizes("toy", None)
    assert cells(of_gpu, "**a GPU", "PEFT")["host, ms"] == launch[first.id, BOTH, "PEFT"]
    assert cells(of_gpu, "Training step, Llama", "fastlora")["host, ms"] == launch[STEP, STEP, "fastlora"]
    short = cells(of_gpu, "of the next", "M=96 K=64 N=80 r=8 p=0, float32")
    for name in ("PEFT", "fastlora"):
        assert short[f"{name}, host ms"] == launch[second.id, BOTH, name]


def test_the_page_says_what_a_cut_run_did_not_reach(toy_run, tmp_path):
    _, own, _ = toy_run
    left = ["f32-1x2x3-r4-p0", "decoder layer", STEP]
    rows = [row for row in own["rows"] if row["id"] not in left]
    (tmp_path / "cut.json").write_text(json.dumps({**own, "rows": rows, "not_reached": left}))
    assert "The time budget ended after 4 sizes; 3 were not reached" in report.text(report.load(tmp_path))


def test_the_committed_page_shows_the_committed_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err
