"""`fastlora bench` measures right results only, counts bytes that can be counted by hand, and writes what it prints."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import benchmark, cli, functional, oracle
from fastlora.benchmark import Contender
from fastlora.oracle import Case

CPU = torch.device("cpu")
M, K, N, R = 96, 64, 80, 4
CASE = Case((M, K, N), rank=R, dropout_p=0.1, bias=False)
SMALL = ["-M", str(M), "-K", str(K), "-N", str(N), "-r", str(R), "--repeats", "3"]


def measured(case: Case = CASE) -> dict[str, benchmark.Measurement]:
    rivals = benchmark.contenders(case, "torch")
    return {measurement.contender: measurement for measurement in benchmark.measure(rivals, case, CPU, repeats=2)}


@pytest.mark.parametrize("dtypes", list(oracle.FLOOR), ids=lambda pair: "+".join(oracle.SHORT[dtype] for dtype in pair))
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_every_contender_is_held_against_its_own_mask(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    case = Case((M, K, N), R, *dtypes, dropout_p=dropout_p)
    for contender in benchmark.contenders(case, "torch"):
        outputs = [row.output for row in benchmark.verify(contender, case, CPU)]
        assert outputs == (["y", "dx", "dA", "dB"] if contender.adapted else ["y", "dx"])


@pytest.mark.parametrize(
    "change",
    [
        {"mask": lambda rows, cols, p, device: torch.rand(rows, cols) >= p},
        {"keep_scale": lambda p: 1.0},
        {"call": benchmark.frozen_linear},
        {"call": lambda *tensors, **options: benchmark.eager_lora(*tensors, **options) * 1.01},
    ],
    ids=["mask", "scale", "no adapter", "factor"],
)
def test_a_wrong_contender_is_not_timed(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = benchmark.contenders(CASE)[1]
    wrong = Contender(**{"name": "wrong", "call": eager.call, "mask": eager.mask, "keep_scale": eager.keep_scale, **change})
    monkeypatch.setattr(benchmark, "_cpu_clock", lambda steps: pytest.fail("timed"))
    with pytest.raises(benchmark.WrongResultError, match="wrong is wrong on f32 96x64x80"):
        benchmark.measure([eager, wrong], CASE, CPU, repeats=1)


@pytest.mark.parametrize("dtypes", list(oracle.FLOOR), ids=lambda pair: "+".join(oracle.SHORT[dtype] for dtype in pair))
def test_eager_is_peft(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The contender called eager is PEFT's layer, bit for bit, forward and backward, its dropout included."""
    peft = pytest.importorskip("peft")
    inputs = oracle.draw(Case((M, K, N), R, *dtypes))
    base = torch.nn.Linear(K, N, dtype=dtypes[0])
    layer = peft.tuners.lora.layer.Linear(
        base, "default", config=peft.LoraConfig(r=R, lora_alpha=R, lora_dropout=0.1), r=R, lora_alpha=R, lora_dropout=0.1
    )
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = inputs.lora_A, inputs.lora_B
    base.weight.data, base.bias.data = inputs.weight, inputs.bias
    results = []
    for eager in (False, True):
        x, lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
        torch.manual_seed(3)
        if eager:
            y = benchmark.eager_lora(x, inputs.weight, lora_A, lora_B, inputs.bias, scaling=1.0, dropout_p=0.1)
        else:
            y, lora_A, lora_B = layer(x), layer.lora_A.default.weight, layer.lora_B.default.weight
        results.append([y, *torch.autograd.grad(y, [x, lora_A, lora_B], inputs.dy)])
    assert all(torch.equal(of_peft, of_ours) for of_peft, of_ours in zip(*results, strict=True))


def test_the_clock_sees_all_of_them_each_round_warm_and_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def clock(steps: benchmark.Steps) -> dict[tuple[str, str], float]:
        rounds.append(list(steps))
        return {key: float(len(rounds)) for key in steps}

    monkeypatch.setattr(benchmark, "_cpu_clock", clock)
    told: list[str] = []
    rivals = benchmark.contenders(CASE, "torch")
    results = benchmark.measure(rivals, CASE, CPU, repeats=5, progress=told.append)
    keys = {(contender.name, name) for contender in rivals for name in benchmark.PASSES}
    assert all(set(order) == keys and len(order) == len(keys) for order in rounds)
    assert len(rounds) == benchmark.WARMUP + 5
    assert len({tuple(order) for order in rounds[benchmark.WARMUP :]}) > 1
    assert len(told) == len(rivals) + benchmark.WARMUP + 5
    for result in results:
        assert result.seconds["forward"] == [4.0, 5.0, 6.0, 7.0, 8.0]
        assert result.quantiles("forward") == pytest.approx((4.8, 6.0, 7.2))


def test_saved_bytes() -> None:
    """The frozen linear saves nothing but W; fastlora x, S and the seed; eager the dropped x, its mask, and S."""
    saved = {name: measurement.saved_bytes for name, measurement in measured().items()}
    assert saved["frozen linear"] == 0
    assert saved["fastlora"] == 4 * M * K + 4 * M * R + 8
    assert saved["eager LoRA"] == 2 * 4 * M * K + 4 * M * R


def test_saved_bytes_counts_a_storage_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert benchmark.saved_bytes(lambda: (x.t() * x) @ x, []) == 2 * 400
    assert benchmark.saved_bytes(lambda: (x.t() * x) @ x, [x]) == 400


def test_peak_bytes_of_known_allocations() -> None:
    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        third = torch.empty(500)
        del second, third

    assert benchmark.peak_bytes(step, CPU) == 4 * 4000


def test_peak_bytes_see_inside_an_operator() -> None:
    """What fastlora's own operators allocate is counted, though no dispatch mode could see it."""
    peaks = {name: measurement.peak_bytes for name, measurement in measured().items()}
    y, dx, adapters = 4 * M * N, 4 * M * K, 4 * R * (K + N)
    assert peaks["frozen linear"] == y + dx
    assert peaks["fastlora"] > y + dx + adapters + 4 * M * R


def test_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *SMALL, "--output", str(tmp_path / "new" / "folder")]) == 0
    out = capsys.readouterr().out
    for word in (
        "forward + backward",
        "frozen linear",
        "eager LoRA",
        "fastlora",
        "median",
        "p20",
        "p80",
        "MiB",
        f"M={M} K={K}",
    ):
        assert word in out
    with (tmp_path / "new" / "folder" / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], row["contender"]) for row in rows] == [
        (name, contender) for name in benchmark.PASSES for contender in ("frozen linear", "eager LoRA", "fastlora")
    ]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert (row["M"], row["dtype"], row["repeats"], row["torch"]) == (str(M), "float32", "3", torch.__version__)
    assert (tmp_path / "new" / "folder" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("slowest", "scattered"), [(1.2, False), (2.0, True)])
def test_a_disturbed_run_says_so(
    slowest: float, scattered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([1.0] * benchmark.WARMUP + [1.0, 1.0, slowest, slowest])
    monkeypatch.setattr(benchmark, "_cpu_clock", lambda steps: dict.fromkeys(steps, next(times)))
    assert cli.main(["bench", *SMALL, "--repeats", "4", "--output", str(tmp_path)]) == 0
    assert ("The times scatter widely" in capsys.readouterr().out) == scattered


def test_json_is_all_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "bfloat16", "--adapter-dtype", "float32", "--bias", "-p", "0.5", "--seed", "7"]
    assert cli.main(["bench", *SMALL, *options, "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    facts = report["facts"]
    assert (facts["dtype"], facts["adapter_dtype"], facts["bias"], facts["p"], facts["seed"]) == (
        "bfloat16",
        "float32",
        True,
        0.5,
        7,
    )
    frozen, eager, fast = report["rows"][3:]
    assert fast["over_eager"] == pytest.approx(fast["median_ms"] / eager["median_ms"])
    assert fast["over_frozen"] == pytest.approx(fast["median_ms"] / frozen["median_ms"])
    assert fast["saved_bytes"] == 2 * M * K + 4 * M * R + 8
    assert all(Path(file).exists() for file in report["files"])


def test_a_wrong_result_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        return F.linear(x, weight) * 2

    monkeypatch.setattr(benchmark, "lora_linear", wrong)
    assert cli.main(["bench", *SMALL, "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "fastlora is wrong on" in captured.err
    assert "OVER" in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-M", "0"], "must be an integer >= 1, got '0'"),
        (["--repeats", "-3"], "must be an integer >= 1, got '-3'"),
        (["--rank", "1.5"], "must be an integer >= 1, got '1.5'"),
        (["--dropout", "1.5"], "must be a number in [0, 1], got '1.5'"),
        (["--dropout", "nan"], "must be a number in [0, 1], got 'nan'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "triton" in functional.available_backends(CPU)
    occupied = tmp_path / "file"
    occupied.touch()
    for arguments, message in (
        (["--backend", "triton"], "Triton's interpreter, whose time means nothing"),
        (["--dtype", "float32", "--adapter-dtype", "float16"], "adapter_dtype"),
        (["--output", str(occupied)], "File exists"),
    ):
        assert cli.main(["bench", *SMALL, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_rich_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match=r'rich is not installed: pip install "fastlora\[cli\]"'):
        cli.main(["bench"])
