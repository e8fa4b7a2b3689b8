"""`python -m benches.report`: the tables and sentences that it makes of a run, and README as it is."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest


def test_the_report(toy_run: tuple[Path, dict, dict], benches: dict[str, ModuleType], tmp_path: Path) -> None:
    folder, own, _ = toy_run
    report, readme = benches["report"], tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**Speed on a GPU has not been measured yet.** `pytest benches --benchmark-only`" in text
    row = next(r for r in own["rows"] if (r["kind"], r["provider"], r["pass"]) == ("linear", "PEFT", "forward + backward"))
    line = next(line for line in text.splitlines() if line.startswith("| PEFT |"))
    assert f"| {row['over_frozen']:.2f} |" in line
    assert report.three_digits(row["median_ms"]) in line
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert list(folder.glob("*.png"))

    step = next(r for r in own["rows"] if (r["kind"], r["provider"]) == ("training step", "fastlora"))
    table = text.partition("| provider | training step, ms |")[2]
    line = next(line for line in table.splitlines() if line.startswith("| fastlora |"))
    assert f"| {report.three_digits(step['median_ms'])} |" in line
    assert f"| {step['over_eager']:.2f} | {report.three_digits(step['peak_bytes'] / 2**20)} |" in line

    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        report.main(arguments)


def cells(text: str, heading: str, line: str) -> dict[str, str]:
    """By column, the line of the first table whose header begins with `heading`."""
    table = text[text.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()
    header, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    return dict(zip(header, next(row for row in rows if row[0] == line), strict=True))


def test_the_report_of_a_gpu(toy_run: tuple[Path, dict, dict], benches: dict[str, ModuleType], tmp_path: Path) -> None:
    _, own, _ = toy_run
    report = benches["report"]
    rows = [{**row, "launch_ms": 0.1 * (1 + index)} for index, row in enumerate(own["rows"])]
    linears = [row for row in rows if row["kind"] == "linear"]
    more = [{**row, "id": f"{row['id']}-{copy}", "used_by": "a model"} for copy in range(report.LISTED) for row in linears]
    facts = {**own["facts"], "device": "a GPU", "driver": "1"}
    gpu = {"facts": facts, "ceilings": {}, "rows": [*rows, *more], "not_reached": ["a size", "training step"]}
    (tmp_path / "cpu.json").write_text(json.dumps(own))
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    shown = report.text(report.load(tmp_path))
    assert "has not been measured" not in shown
    assert f"the next {report.LISTED} of {1 + 2 * report.LISTED} other sizes, over the frozen linear's" in shown
    assert shown.count("| a model |") == report.LISTED - 1  # the first of them is the second size of the suite

    _, of_gpu, of_cpu = re.split(r"^\*\*(?=a GPU|" + re.escape(own["facts"]["device"]) + ")", shown, flags=re.MULTILINE)
    assert report.HOST in of_gpu
    assert "host" not in of_cpu
    launch = {(row["id"], row["pass"], row["provider"]): report.three_digits(row["launch_ms"]) for row in rows}
    both, first, second = "forward + backward", "f32-96x64x80-r8-p0.1", "f32-96x64x80-r8-p0"
    assert cells(of_gpu, "provider", "PEFT")["host, ms"] == launch[first, both, "PEFT"]
    for kind in ("Decoder layer", "Training step"):
        id_, pass_ = kind.lower(), both if kind == "Decoder layer" else kind.lower()
        table = of_gpu[of_gpu.index(f"{kind}, Llama") :]
        assert cells(table, "provider", "fastlora")["host, ms"] == launch[id_, pass_, "fastlora"]
    short = cells(of_gpu, "size", "M=96 K=64 N=80 r=8 p=0, float32")
    for name in ("PEFT", "fastlora"):
        assert short[f"{name}, host ms"] == launch[second, both, name]


@pytest.mark.parametrize("left", [[], ["f32-1x2x3-r4-p0", "decoder layer", "training step"]], ids=["whole", "cut"])
def test_the_report_says_what_a_cut_run_did_not_reach(
    left: list[str], toy_run: tuple[Path, dict, dict], benches: dict[str, ModuleType], tmp_path: Path
) -> None:
    _, own, _ = toy_run
    rows = [row for row in own["rows"] if row["id"] not in left]
    (tmp_path / "cut.json").write_text(json.dumps({**own, "rows": rows, "not_reached": left}))
    shown = benches["report"].text(benches["report"].load(tmp_path))
    assert ("The time budget ended after 2 sizes; 3 were not reached" in shown) == bool(left)
    assert ("not reached" in shown) == bool(left)


def test_the_report_says_what_the_grid_and_the_roofline_are(
    toy_run: tuple[Path, dict, dict], benches: dict[str, ModuleType], tmp_path: Path
) -> None:
    report, grid = benches["report"], benches["grid"]
    assert "not the whole product, as `--grid everything` is" in report.text({})
    assert f"every M\nfrom {min(grid.ROWS)} on" in report.text({})
    assert f"M = {grid.FEW_ROWS[0]}, {grid.FEW_ROWS[1]} and {grid.FEW_ROWS[2]}." in report.text({})
    folder, own, _ = toy_run
    text = report.text(report.load(folder))
    assert f"copy {report.three_digits(own['ceilings']['float32']['copy_gbps'])} GB/s.\nThe roofline is the least time" in text


def test_readme_shows_the_results(benches: dict[str, ModuleType]) -> None:
    assert benches["report"].main(["--check"]) == 0
