"""`fastlora parity --function`: what is wrong with a user's function is a verdict, and what is no function is refused."""

import json

import pytest
import torch

from fastlora import cli
from fastlora.cli import own_function

MODULE = """
import fastlora, torch
def right(*tensors, **options): return fastlora.lora_linear(*tensors, backend="torch", **options)
def inexact(*tensors, **options): return right(*tensors, **options) * (1 + 1e-9)
def shape(*tensors, **options): return right(*tensors, **options)[:, :-1]
def dtype(*tensors, **options): return right(*tensors, **options).double()
def detached(x, W, A, B, bias, **options): return right(x, W, A.detach(), B, bias, **options)
def no_graph(*tensors, **options): return right(*(t if t is None else t.detach() for t in tensors), **options)
def nothing(*tensors, **options): pass
def crash(*tensors, **options): raise KeyError("[red] lanes")
def scaled(*tensors, scaling, **options): return right(*tensors, scaling=1.01 * scaling, **options)
class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y): return y.clone()
    @staticmethod
    def backward(ctx, dy): raise ValueError("no backward")
def backward(x, *tensors, **options): return Backward.apply(x, right(x, *tensors, **options))
number = 3
"""
GRADIENTS = ["dx", "dA", "dB"]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module of the user's, in the current folder, and few cases."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(own_function.sys.path))
    monkeypatch.delitem(own_function.sys.modules, "mine", raising=False)


def test_the_cases():
    """Ragged, tiny and empty shapes, float64, every dropout rate that matters."""
    found = own_function.cases([(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], seed=3)
    assert {case.dtype for case in found} == {torch.float64, torch.bfloat16}
    assert {case.seed for case in found} == {3}
    assert {min(case.shape) for case in found} >= {0, 1, 17}
    assert {case.dropout_p for case in found} == {0.0, 0.1, 0.5, 1.0}


@pytest.mark.parametrize(
    ("name", "failing", "note"),
    [
        ("right", [], ""),
        ("shape", ["y", *GRADIENTS], "torch.float32 (17, 64) instead of torch.float32 (17, 65)"),
        ("dtype", ["y"], "torch.float64 (17, 65) instead of torch.float32 (17, 65)"),
        ("detached", ["dA"], "no gradient"),
        ("no_graph", GRADIENTS, "no gradient"),
        ("nothing", ["y", *GRADIENTS], "raised TypeError: the function returned NoneType, expected a tensor"),
        ("crash", ["y", *GRADIENTS], "raised KeyError: '[red] lanes'"),
        ("backward", GRADIENTS, "raised ValueError: no backward"),
    ],
)
def test_a_verdict_for_everything(name, failing, note, capsys):
    command = ["parity", "--function", f"mine:{name}", "--dtype", "float32"]
    code, rows = cli.main([*command, "--json"]), json.loads(capsys.readouterr().out)["rows"]
    assert code == bool(failing)
    assert [row["output"] for row in rows[:4] if not row["passed"]] == failing
    assert {row["backend"] for row in rows} == {f"mine:{name}"}
    assert note in [row["note"] for row in rows[:4]]
    assert cli.main(command) == code
    out = capsys.readouterr().out
    assert note in out
    assert ("are within their bounds (7 cases, mine:" if not failing else "errors are over their bounds (7 cases,") in out


@pytest.mark.parametrize(("name", "dtype"), [("scaled", "bfloat16+float32"), ("inexact", "float64")])
def test_a_wrong_number(name, dtype, capsys):
    """Also a float64 result that is exact to 1e-9 only."""
    assert cli.main(["parity", "--function", f"mine:{name}", "--dtype", dtype]) == 1
    assert "OVER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--function mine", "must be MODULE:NAME, my_kernels:lora_linear say, got 'mine'"),
        ("--function yours:right", "there is no module 'yours' in this folder or the Python path"),
        ("--function mine:wrong", "module 'mine' has no attribute 'wrong'"),
        ("--function mine:number", "mine:number must be a function, got int"),
        ("--function mine:right --backend torch", "leave out --cases and --backend"),
        ("--function mine:right --cases 3", "leave out --cases and --backend"),
        ("--dtype float64", "--dtype float64 is for --function"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert cli.main(["parity", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out
