"""The environment names the code, the versions and the device that a figure comes from."""

import subprocess
from pathlib import Path

import pytest
import torch

from fastlora import dispatch, environment
from fastlora.dispatch import Problem
from fastlora.kernels.target import Target

GPU = torch.device("cuda")


def test_the_code_and_the_machine_are_named() -> None:
    facts = environment.environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"commit", "triton", "peft", "python", "device", "threads", "date"}


def test_code_that_differs_from_the_commit_is_marked_and_results_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    code = [tmp_path / name for name in ("fastlora/environment.py", "kernels/gemm.py", "benches/suite.py")]
    for path in code:
        path.parent.mkdir(parents=True)
        path.write_text("before\n")
    monkeypatch.setattr(environment, "__file__", str(code[0]))
    assert environment.commit() is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    (tmp_path / "benches" / "results").mkdir()
    (tmp_path / "benches" / "results" / "new.json").touch()
    head = environment.commit()
    assert head is not None
    assert len(head) == 12
    for path in code:
        path.write_text("after\n")
        assert environment.commit() == f"{head}+changes"
        path.write_text("before\n")
    (tmp_path / "benches" / "new.py").touch()
    assert environment.commit() == f"{head}+changes"


def test_a_gpu_is_named_with_its_driver_and_its_tuning_results(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Target(90, 132, 232448, "Test GPU 9000")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("fastlora.kernels.target.target_of", lambda device: gpu)
    monkeypatch.setattr(environment, "_first_line", lambda *command: "580.1" if command[0] == "nvidia-smi" else None)
    before = environment.environment(GPU)
    assert (before["device"], before["capability"], before["driver"], before["tuned"]) == (gpu.name, "sm_90", "580.1", None)
    tuned = []
    for form in ("fused", "addmm", "addmm"):
        dispatch.store(gpu, {Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16, True): form})
        tuned.append(environment.environment(GPU)["tuned"])
    assert len({None, *tuned}) == 3
    assert tuned[1] == tuned[2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert environment.environment(GPU)["tuned"] is None
