"""`fastlora parity` as a person and a script run it: the table, the JSON, the exit codes, the refusals."""

import json
from collections import Counter

import pytest

from fastlora import backends, cli, functional
from fastlora.cli import common, parity


def run(arguments):
    return cli.main(["parity", *arguments.split()])


@pytest.fixture
def run_json(capsys):
    """run_json(arguments) -> (exit code, report)."""
    return lambda arguments: (run(f"--json {arguments}"), json.loads(capsys.readouterr().out))


@pytest.fixture
def replaced(monkeypatch):
    """replaced(wrong): calls wrong(right, *tensors, **options) for `functional.lora_linear`."""
    right = functional.lora_linear
    return lambda wrong: monkeypatch.setattr(
        functional, "lora_linear", lambda *tensors, **options: wrong(right, *tensors, **options)
    )


def test_the_table_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setattr(common, "PIPE_WIDTH", 80)
    assert run("--cases 3 --backend torch --dtype bfloat16") == 0
    out = capsys.readouterr().out
    for word in ("backend", "output", "fastlora", "eager", "bound", "verdict", "bf16", "dx", "dA", "dB", "ok"):
        assert word in out
    cases = parity.draw_cases(["bfloat16"], 3, seed=0)
    lines = out.splitlines()
    assert [line.strip() for line in lines if line.startswith(" bf16")] == [str(case) for case in cases]
    assert sum(line.split()[:1] == ["torch"] for line in lines) == sum(len(case.outputs) for case in cases)
    assert max(map(len, lines)) <= 80
    assert "errors are within their bounds (3 cases, torch backend)" in " ".join(lines)
    assert "OVER" not in out


def test_every_available_backend_is_checked(run_json, monkeypatch):
    monkeypatch.setattr(parity, "SHAPES", ((16, 32, 256),))  # the kernels are interpreted
    monkeypatch.setattr(parity, "RANKS", (8,))
    code, report = run_json("--cases 2 --dtype float32 --dtype bfloat16+float32")
    assert code == 0
    assert report["backends"] == ["torch", "addmm", "fused"]
    assert {row["backend"] for row in report["rows"]} == {"torch", "addmm", "fused"}
    dtypes = {(row["case"]["dtype"], row["case"]["adapter_dtype"]) for row in report["rows"]}
    assert dtypes == {("torch.float32", "torch.float32"), ("torch.bfloat16", "torch.float32")}
    assert all(row["passed"] and row["error"] <= row["bound"] for row in report["rows"])


def test_an_error_over_its_bound_fails_the_run(replaced, run_json, capsys):
    replaced(lambda right, *tensors, **options: right(*tensors, **{**options, "scaling": 3.0}))
    arguments = "--cases 4 --backend torch --dtype float16"
    assert run(arguments) == 1
    out = capsys.readouterr().out
    assert "OVER" in out
    assert "errors are over their bounds" in out
    code, report = run_json(arguments)
    assert (code, report["passed"]) == (1, False)


def test_a_crash_names_its_case(replaced):
    replaced(lambda right, *tensors, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run("--cases 1 --seed 5 --dtype float32 --backend torch")
    assert "while checking f32" in caught.value.__notes__[0]
    assert "seed 5, on the torch backend" in caught.value.__notes__[0]


def test_the_seed_decides_the_cases_and_the_errors(run_json):
    first, again, other = (run_json(f"--cases 3 --backend torch --seed {seed}")[1]["rows"] for seed in (1, 1, 2))
    assert first == again != other


def test_cases_cover_every_axis_equally():
    cases = parity.draw_cases(list(parity.DTYPES), 40, seed=0)
    assert len(cases) == 40
    for axis, values in (
        ([(case.dtype, case.adapters) for case in cases], parity.DTYPES.values()),
        ([case.shape for case in cases], parity.SHAPES),
        ([case.rank for case in cases], parity.RANKS),
        ([case.dropout_p for case in cases], parity.DROPOUTS),
        ([case.bias for case in cases], parity.BIAS),
    ):
        counts = Counter(axis)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_without_the_interpreter_it_says_what_was_not_checked(monkeypatch, capsys):
    monkeypatch.setattr(backends, "available_backends", lambda device: ("torch",))
    assert run("--cases 1") == 0
    out = capsys.readouterr().out
    assert "Not checked: the Triton kernels" in out
    assert "TRITON_INTERPRET=1 fastlora parity" in out
    assert run("--cases 1 --backend fused") == 2
    out, err = capsys.readouterr()
    assert "TRITON_INTERPRET=1 fastlora parity --backend fused" in err
    assert not out
