"""`pytest benches` at toy size: interleaved times reach pytest-benchmark and the files, and a run can be resumed."""

import contextlib
import csv
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

import benches.conftest
from benches import grid
from benches.setting import LAYER, PASSES_OF
from benches.suite import STEPS, NotMeasuredError, Suite
from fastlora.benchmark import PASSES, ceilings, providers, trial
from fastlora.benchmark.clock import WARMUP, CudaClock

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FIRST, SECOND = grid.sizes("toy", CPU)
PROVIDERS = ["frozen linear", "eager LoRA", "PEFT", "chained addmm_", "fastlora"]
CONTENDERS = ["frozen", "PEFT", "chained addmm_, p = 0", "fastlora, single linears", "fastlora"]


def test_a_run_does_not_replace_the_committed_results_unless_asked():
    parser = pytest.Parser(_ispytest=True)
    benches.conftest.pytest_addoption(parser)
    assert parser.parse([]).results == ROOT / "build" / "benchmarks"
    assert parser.parse(["--results", "benches/results"]).results == Path("benches/results")
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()


def test_pytest_benchmark_shows_the_interleaved_times(toy_run):
    _, own, saved = toy_run
    assert saved["machine_info"]["fastlora"] == own["facts"]
    rows = {(row["id"], row["pass"], row["provider"]): row for row in own["rows"]}
    assert len(saved["benchmarks"]) == len(rows)
    for entry in saved["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        row = rows[info["id"], info["pass"], info["provider"]]
        assert entry["group"] == " ".join(dict.fromkeys((info["id"], info["pass"])))
        assert info == {key: value for key, value in row.items() if value is not None}
        assert stats["rounds"] == len(stats["data"]) == 3
        assert stats["median"] * 1e3 == pytest.approx(row["median_ms"])
        assert entry["options"]["timer"].endswith("recorded_clock")


def test_the_files_have_every_provider_and_pass_of_every_size(toy_run):
    folder, own, _ = toy_run
    found = {}
    for row in own["rows"]:
        found.setdefault(row["id"], {}).setdefault(row["pass"], []).append(row["provider"])
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert list(found.items()) == [
        (FIRST.id, dict.fromkeys(PASSES, PROVIDERS)),
        (SECOND.id, dict.fromkeys(PASSES, PROVIDERS)),
        *((kind, dict.fromkeys(passes, CONTENDERS)) for kind, passes in PASSES_OF.items()),
    ]
    assert all(row["p"] == 0 for row in own["rows"] if row["provider"] == "chained addmm_, p = 0")
    assert (own["facts"]["repeats"], own["not_reached"]) == (3, [])
    (file,) = folder.glob("*.csv")
    with file.open() as text:
        written = list(csv.DictReader(text))
    assert len(written) == len(own["rows"])
    for row in written:
        assert (row["torch"], row["repeats"]) == (torch.__version__, "3")
        assert {name: float(row[name]) for name in ("gemm_tflops", "copy_gbps")} == own["ceilings"]["float32"]


@pytest.fixture
def open_suite(tmp_path, monkeypatch):
    """open_suite(**options) -> a Suite of toys on the CPU; what it tells the user is in `suite.told`."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (32, 1 << 16)})
    monkeypatch.setattr("fastlora.environment.commit", lambda: "abc")

    def open_suite(**options):
        told = []
        defaults = {"repeats": 1, "compiler": None, "budget": math.inf, "toy": True, "tell": told.append}
        suite = Suite(tmp_path / "results.json", CPU, **defaults | options)
        suite.told = told
        return suite

    return open_suite


def test_the_first_size_is_also_timed_under_torch_compile(open_suite):
    compiled = [*PROVIDERS, "compiled eager", "compiled PEFT", "compiled fastlora"]
    for compiler, size, names in ((None, FIRST, PROVIDERS), ("aot_eager", FIRST, compiled), ("aot_eager", SECOND, PROVIDERS)):
        assert [provider.name for provider in open_suite(compiler=compiler).providers(size)] == names


def test_a_run_stops_with_its_budget_and_resumes_even_when_interrupted(open_suite, monkeypatch):
    suite = open_suite()
    suite.linear(FIRST, "fastlora", "forward")
    suite.deadline = 0.0
    suite.linear(FIRST, "eager LoRA", "backward")
    with pytest.raises(NotMeasuredError, match="budget is spent"):
        suite.linear(SECOND, "fastlora", "forward")
    suite.content["rows"][0].update(p20_ms=1.0, p80_ms=1.6)
    summary = " ".join(suite.summary())
    assert "1 sizes were not reached" in summary
    assert "scatter widely" in summary
    suite.close()
    before = sorted(suite.path.parent.iterdir()), suite.path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            suite.close()
    assert (sorted(suite.path.parent.iterdir()), suite.path.read_text()) == before

    suite = open_suite(resume=True)
    with pytest.raises(NotMeasuredError, match="measured before"):
        suite.linear(FIRST, "fastlora", "forward")
    suite.linear(SECOND, "fastlora", "forward")
    suite.close()
    content = json.loads(suite.path.read_text())
    assert list(dict.fromkeys(row["id"] for row in content["rows"])) == [FIRST.id, SECOND.id]
    assert content["not_reached"] == []

    for changed in ({"torch": "1.0"}, {"repeats": 2}):
        suite.path.write_text(json.dumps({**content, "facts": {**content["facts"], **changed}}))
        suite = open_suite(resume=True)
        assert "under other conditions" in suite.told[0]
        assert suite.content["rows"] == []


def test_large_times_and_launches_of_a_gpu(open_suite, monkeypatch):
    class FakeClock(CudaClock):
        def __call__(self, name, step):
            step()
            launches = self.launches.setdefault(name, [])
            launches.append(1.0 if len(launches) < WARMUP else 2e-3)
            return 4.52

    monkeypatch.setattr(trial, "device_clock", FakeClock)
    suite = open_suite(repeats=3)
    seconds, row = suite.model(LAYER, "fastlora", "forward")
    assert (seconds, row["median_ms"], row["launch_ms"]) == ([4.52] * 3, 4520.0, 2.0)
    assert suite.told == ["decoder layer: " + ", ".join(f"{name} 4520" for name in CONTENDERS) + " ms"]


@pytest.mark.parametrize(
    ("broken", "error", "message", "failing"),
    [
        ("chained_addmm", None, "is wrong on", ["chained addmm_"]),
        ("chained_addmm", OutOfResources(300000, 232448, "shared memory"), "out of resource", ["chained addmm_"]),
        ("frozen_linear", None, "is wrong on", PROVIDERS),
    ],
    ids=["wrong", "raises", "frozen linear"],
)
def test_a_broken_provider_fails_alone_and_a_broken_frozen_linear_fails_all(
    broken, error, message, failing, open_suite, monkeypatch
):
    def wrong(x, weight, *rest, **options):
        if error:
            raise error
        return F.linear(x, weight * 2)

    monkeypatch.setattr(providers, broken, wrong)
    suite = open_suite()
    for name in PROVIDERS:
        with pytest.raises(Exception, match=message) if name in failing else contextlib.nullcontext():
            suite.linear(SECOND, name, "forward")


def test_what_does_not_fit_is_tried_once_and_reported_to_each_test(open_suite, monkeypatch):
    steps = mock.Mock(side_effect=torch.OutOfMemoryError("too much"))
    monkeypatch.setitem(STEPS, LAYER, steps)
    suite = open_suite()
    for provider in ("PEFT", "fastlora"):
        with pytest.raises(NotMeasuredError, match=r"does not fit into the memory of .*too much"):
            suite.model(LAYER, provider, "forward")
    steps.assert_called_once()
