"""What the tests rely on: memory that nobody wrote is NaN, and a process runs Triton in one mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
ALLOCATIONS = [
    "torch.empty(3, 5, dtype=dtype)",
    "torch.empty_like(like)",
    "torch.empty_strided((3, 5), (1, 3), dtype=dtype)",
    "torch.empty_permuted((3, 5), (1, 0), dtype=dtype)",
    "like.new_empty(3, 5)",
    "like.new_empty_strided((3, 5), (1, 3))",
]


def allocate(expression: str, module: str, dtype: torch.dtype) -> torch.Tensor:
    like = torch.zeros(3, 5, dtype=dtype)
    return eval(expression, {"__name__": module, "torch": torch, "like": like, "dtype": dtype})


@pytest.mark.parametrize("module", ["fastlora", "fastlora.torch_backend", "fastlora.kernels.shrink"])
@pytest.mark.parametrize("expression", ALLOCATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_package_allocations_are_poisoned(expression: str, module: str, dtype: torch.dtype) -> None:
    tensor = allocate(expression, module, dtype)
    assert tensor.dtype == dtype
    assert tensor.shape == (3, 5)
    if dtype.is_floating_point:
        assert tensor.isnan().all()
    else:
        assert set(tensor.contiguous().view(torch.uint8).flatten().tolist()) == {0xA5}


def test_other_allocations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", None)  # the poison needs it
    for expression in ALLOCATIONS:
        assert allocate(expression, "fastlorax", torch.float32).shape == (3, 5)


def test_each_process_has_one_mode() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/compile", "tests/core/test_conftest.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "a pytest process of its own" in run.stderr
