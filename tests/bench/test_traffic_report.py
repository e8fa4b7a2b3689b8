"""The counts are right where they are known, and so are the report, the partial sums and what is saved for backward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from planned import run_grad_a, run_grad_s_and_b, run_shrink
from triton.runtime.errors import InterpreterError

from fastlora import lora_linear
from fastlora.kernels import launch as launching
from fastlora.kernels.grad_b import MAX_RANK
from fastlora.kernels.sums import sum_partials_kernel
from fastlora.kernels.target import INTERPRETER, Target
from tools.traffic import Launch, counted
from tools.traffic_report import FORMS, Case, main, rows

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


def planted(fault: str, x: torch.Tensor, out: torch.Tensor) -> Launch:
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
    """Where one program covers a reduction and one tile a product, nothing moves but the operands of each step; in the prefill
    form also the rank-r terms, written by one launch and read by the next."""
    M, K, N, r, e = 32, 64, 48, 16, 2
    case = Case(M, K, N, r, form=form, target=Target(90, 1, INTERPRETER.shared_memory))
    more = dict.fromkeys(("S", "y", "dS dB", "dA", "dx"), 0)
    if form == "addmm":
        more["y"] = 2 * M * N * e
        more["dA"] = M * K * e + r * K * e  # the term, and A for it, which the GEMM of dx then does without
        more["dx"] = M * K * e - M * r * 4 - r * K * e
    moved = {row.step: row.needed + row.written - row.compulsory for row in rows(case)}
    assert moved == more


# Of the bytes of x or dy that a step streams, what it writes of partial sums and reads again at full size, in bfloat16 on an
# H200: at most (S, dS dB, dA).  L2 (50 MB) holds them; the rest of the chip waits for them all the same.
PARTIAL_SUMS = {
    (8192, 4096, 16): (1 / 16, 1 / 4, 1 / 8),
    (8192, 4096, 32): (1 / 8, 3 / 4, 1 / 4),
    (8192, 14336, 16): (1 / 16, 1 / 4, 1 / 16),
    (32768, 4096, 16): (0, 1 / 4, 1 / 16),
    (8192, 4096, 64): (1 / 4, 0, 1 / 4),
    (2048, 4096, 16): (1 / 8, 5 / 8, 1 / 4),
    (512, 2048, 128): (2, 0, 2),
}


@pytest.mark.parametrize("size", PARTIAL_SUMS)
def test_partial_sums_stay_small(size, monkeypatch):
    """The launches alone, on the meta device: that each partial sum is written once and read once is asserted above."""
    M, K, r = size
    target = Target(90, 132, 232448)

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, A, B, U = meta(M, K), meta(r, K), meta(K, r), meta(M, r, dtype=torch.float32)
    fractions = []
    for step in (
        lambda: run_shrink(x, A, target),
        lambda: run_grad_s_and_b(x, B, U, torch.bfloat16, target) if r <= MAX_RANK else None,
        lambda: run_grad_a(x, U, torch.bfloat16, target),
    ):
        partials = []

        def watch(plan, *args, partials=partials):
            if plan.kernel is sum_partials_kernel:
                partials += [tensor for tensor in (args[0], args[2]) if tensor is not None]

        monkeypatch.setattr(launching, "launch", watch)
        step()
        fractions.append(2 * sum(tensor.numel() * 4 for tensor in partials) / (M * K * 2))
    assert all(fraction <= stated for fraction, stated in zip(fractions, PARTIAL_SUMS[size], strict=True)), fractions


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_saved_for_backward(form, adapter):
    """x, S in float32 and the seed: no dropped copy of x, no mask."""
    M, K, N, r = 48, 64, 80, 4
    x, weight = torch.randn(M, K).bfloat16().requires_grad_(), torch.randn(N, K).bfloat16()
    A, B = (torch.randn(*shape).to(adapter).requires_grad_() for shape in ((r, K), (N, r)))
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, weight, A, B, scaling=2.0, dropout_p=0.1, backend=form)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (weight, A, B)}
    assert parameters <= set(saved)
    assert sum(size for key, size in saved.items() if key not in parameters) == M * K * 2 + M * r * 4 + 8


def test_report(capsys):
    assert main(["--shape", "24,40,32", "--rank", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["form"], row["step"]) for row in report] == [
        (form, step) for form in FORMS for step in ("S", "y", "dS dB", "dA", "dx")
    ]
    assert all(1 <= row["ratio"] <= row["requested_ratio"] for row in report if row["form"] == "fused")
    assert main(["--shape", "24,40,32", "--form", "addmm"]) == 0
    assert "gemm (addmm_)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "24,40"], "invalid shape M,K,N value: '24,40'"),
        (["--rank", "0"], "invalid whole number of at least 1 value: '0'"),
        (["--dropout", "1.5"], "invalid probability value: '1.5'"),
    ],
)
def test_report_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


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
