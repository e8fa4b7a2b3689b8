"""What a row of results holds: bytes and operations that can be counted by hand, ratios of medians, the roofline."""

import math

import pytest
import torch

from fastlora import benchmark
from fastlora.benchmark import ceilings, memory, providers, results
from fastlora.benchmark.clock import quantiles
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)
WHOLE = "forward + backward"


@pytest.fixture(scope="module")
def measured():
    """(rows, seconds by provider and pass)."""
    return benchmark.run(providers.providers_for(CASE, CPU), CASE, CPU, repeats=2, copies=2)


def test_bytes_stand_with_forward_and_backward(measured):
    """The frozen linear saves nothing but W; fastlora x, S and the mask's bits; eager the dropped x, its mask, and S."""
    counted = [row for row in measured[0] if row["saved_bytes"] is not None and row["peak_bytes"] is not None]
    assert {row["pass"] for row in counted} == {WHOLE}
    assert {row["provider"]: row["saved_bytes"] for row in counted} == {
        "frozen linear": 0,
        "eager LoRA": 2 * 4 * M * K + 4 * M * R,
        "PEFT": 2 * 4 * M * K + 4 * M * R,
        "chained addmm_": 4 * M * K + M * K + 4 * M * R,
        "fastlora": 4 * M * K + 4 * M * R + M * -(-K // 8),
    }
    peaks = {row["provider"]: row["peak_bytes"] for row in counted}
    y, dx, adapters = 4 * M * N, 4 * M * K, 4 * R * (K + N)
    assert peaks["frozen linear"] == y + dx
    assert peaks["fastlora"] > y + dx + adapters + 4 * M * R  # inside its operators, too


def test_saved_bytes_counts_a_storage_once():
    x = torch.randn(10, 10, requires_grad=True)
    assert memory.saved_bytes(lambda: (x.t() * x) @ x, []) == 2 * 400
    assert memory.saved_bytes(lambda: (x.t() * x) @ x, [x]) == 400


def test_peak_bytes_of_known_allocations():
    def step():
        first, second = torch.empty(1000), torch.empty(3000)
        del first
        third = torch.empty(500)
        del second, third

    assert memory.peak_bytes(step, CPU) == 4 * 4000
    assert 1 << 28 < memory.total_bytes(CPU) < 1 << 50


def test_the_floor_counts_each_operation_and_byte_once():
    case = Case((2, 3, 5), rank=7, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=True)
    alone = Case((2, 3, 5), rank=0, dtype=torch.bfloat16, bias=False)
    assert ceilings.operations(alone, "forward") == 2 * 2 * 3 * 5
    assert ceilings.operations(case, "forward") == 2 * 2 * 3 * 5 + 2 * 2 * 7 * (3 + 5)
    assert ceilings.operations(case, "backward") == 2 * 2 * 3 * 5 + 4 * 2 * 7 * (3 + 5)
    frozen = 2 * (2 * 3 + 5 * 3 + 2 * 5)
    assert ceilings.compulsory_bytes(alone, "backward") == frozen
    assert ceilings.compulsory_bytes(case, "forward") == frozen + 2 * 5 + 4 * 7 * (3 + 5) + 4 * 2 * 7
    assert ceilings.compulsory_bytes(case, "backward") == frozen + 2 * 3 * 2 + 2 * 4 * 7 * (3 + 5) + 4 * 2 * 7
    assert ceilings.Ceilings(1e-12, math.inf).floor(case, WHOLE) == 4 * 2 * 3 * 5 + 6 * 2 * 7 * (3 + 5)
    assert ceilings.Ceilings(math.inf, 1e-9).floor(alone, "backward") == frozen


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    times = {"gemm": [2.0, 1.0], "copy": [4.0, 8.0]}
    monkeypatch.setattr(ceilings, "measure", lambda steps, *_: [step() for step in steps.values()] and times)
    found = ceilings.measure_ceilings(torch.float32, CPU)
    assert found == pytest.approx((2 * 64**3 / 1e12, (2 << 20) / 4 / 1e9))


def test_rows(measured, tmp_path):
    rows = results.linear_rows(measured[0], CASE, ceilings.Ceilings(1e-3, math.inf))
    assert [(row["provider"], row["pass"]) for row in rows] == list(measured[1])
    found = {row["provider"]: row for row in rows if row["pass"] == "forward"}
    seconds = {name: quantiles(times).median for (name, pass_), times in measured[1].items() if pass_ == "forward"}
    for name, ratio in (("frozen linear", "over_frozen"), ("eager LoRA", "over_eager")):
        assert found["fastlora"][ratio] == pytest.approx(seconds["fastlora"] / seconds[name])
    for name, r in (("frozen linear", 0), ("fastlora", R)):
        percent = 100 * (2 * M * (K * N + r * (K + N)) / 1e9) / seconds[name]
        assert found[name]["roofline_percent"] == pytest.approx(percent)
    assert found["fastlora"]["saved_bytes"] is None
    results.write_csv([found["fastlora"], {"other": 1}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines()[0].endswith(",other")
