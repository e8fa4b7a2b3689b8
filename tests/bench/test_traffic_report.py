"""The counts of tools/traffic.py are right where they are known, and so is the report of tools/traffic_report.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastlora.kernels import launch as launching
from fastlora.kernels.target import INTERPRETER, Target
from tools.traffic import CountedLaunch, counted
from tools.traffic_report import FORMS, TrafficCase, main, rows

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("unpoisoned")


@triton.jit
def planted_kernel(x, out, size, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """out = x, or a fault: x read twice, an atomic, an access beyond x."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, mask=index < size, other=0.0)
    if FAULT == "twice":
        values = tl.load(x + index, mask=index < size, other=0.0)
    if FAULT == "atomic":
        tl.atomic_add(out + index, values, mask=index < size)
    elif FAULT == "beyond":
        values = tl.load(x + index)
    else:
        tl.store(out + index, values, mask=index < size)


def planted(fault: str, x: torch.Tensor, out: torch.Tensor) -> CountedLaunch:
    with counted() as launches:
        options = {"BLOCK": 16, "FAULT": fault, "num_warps": 1, "num_stages": 1}
        launching.launch(launching.Plan(planted_kernel, (2,), (), options), x, out, x.numel())
    return launches[0]


def test_counts_are_those_of_a_known_kernel():
    x, out = torch.randn(23), torch.empty(23)
    launch = planted("", x, out)
    assert (launch.kernel, launch.grid, launch.counted) == ("planted", (2,), True)
    assert [(o.bytes_loaded, o.bytes_needed, o.bytes_stored) for o in launch.operands] == [(92, 92, 0), (0, 0, 92)]
    assert torch.equal(x, out)
    twice = planted("twice", x, out)["x"]
    assert (twice.bytes_loaded, twice.bytes_needed) == (184, 92)
    assert planted("atomic", x, out).atomics == 2
    with pytest.raises(InterpreterError, match="planted loads from memory outside"):
        planted("beyond", x, out)
    with pytest.raises(ValueError, match="x and out share memory"):
        planted("", x, x)


def test_strided_operands_count_what_they_hold():
    """Elements between those of a strided tensor are not its own."""
    columns = torch.randn(23, 2)
    with counted() as launches:
        columns[:, 0].sum()
        columns[:1].expand(5, 2).sum()
    assert [launch["self"].bytes_loaded for launch in launches] == [23 * 4, 2 * 4]
    assert [launch["self"].loads.shape for launch in launches] == [(23,), (5, 2)]


def test_operations_of_torch_are_launches():
    x = torch.randn(6, 8).bfloat16()
    with counted() as launches:
        x.float().t()[1:].contiguous()
        torch.empty(3, 4).view(12)
        torch.zeros(5)
    assert [launch.kernel for launch in launches] == ["_to_copy", "clone", "zeros"]
    moved = [(launch.total("bytes_loaded"), launch.total("bytes_stored")) for launch in launches]
    assert moved == [(96, 192), (168, 168), (0, 20)]


def test_compiled_kernels_are_refused():
    with counted(), pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        launching.launch(launching.Plan(object(), (1,), (), {}))


@pytest.mark.parametrize("form", FORMS)
def test_unsplit_traffic_is_compulsory(form):
    """One program covers each reduction and one tile each product: only the operands of each step move.

    In the form "addmm" the LoRA terms move as well: one launch writes them and the next reads them.
    """
    M, K, N, r, e = 32, 64, 48, 16, 2
    case = TrafficCase(M, K, N, r, form=form, target=Target(90, 1, INTERPRETER.shared_memory))
    more = dict.fromkeys(("S", "y", "dS dB", "dA", "dx"), 0)
    if form == "addmm":
        more["y"] = 2 * M * N * e
        more["dA"] = M * K * e + r * K * e  # the term, and A for it, which the GEMM of dx then does without
        more["dx"] = M * K * e - M * r * 4 - r * K * e
    moved = {row.step: row.needed + row.written - row.compulsory for row in rows(case)}
    assert moved == more


def test_report(capsys):
    assert main(["--shape", "24,40,32", "--rank", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["form"], row["step"]) for row in report] == [
        (form, step) for form in FORMS for step in ("S", "y", "dS dB", "dA", "dx")
    ]
    assert all(1 <= row["ratio"] <= row["requested_ratio"] for row in report if row["form"] == "fused")
    assert main(["--shape", "24,40,32", "--form", "addmm"]) == 0
    assert "gemm (addmm_)" in capsys.readouterr().out


def test_report_refuses(capsys):
    with pytest.raises(SystemExit):
        main(["--shape", "24,40"])
    assert "invalid shape M,K,N value: '24,40'" in capsys.readouterr().err


def test_only_the_command_turns_the_interpreter_on():
    """An import must not: pytest -m gpu imports every test, and this one's tools, beside kernels that it compiles."""
    program = "import os, tools.traffic_report; print(os.environ.get('TRITON_INTERPRET'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout == "None\n"
    shape = ["-m", "tools.traffic_report", "--shape", "32,32,32", "--form", "addmm", "--json"]
    done = subprocess.run([sys.executable, *shape], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert len(json.loads(done.stdout)) == 5
