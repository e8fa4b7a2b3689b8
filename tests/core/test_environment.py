"""The environment names the code, the versions and the device that a figure comes from."""

import subprocess
from unittest import mock

import pytest
import torch
from tuned import GPU, LARGE

from fastlora import dispatch, environment


def test_the_code_and_the_machine_are_named():
    facts = environment.environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"commit", "triton", "peft", "python", "device", "threads", "date"}


def test_code_that_differs_from_the_commit_is_marked_and_results_are_not(tmp_path, monkeypatch):
    code = [tmp_path / name for name in ("fastlora/environment.py", "kernels/gemm.py", "benches/suite.py")]
    for path in code:
        path.parent.mkdir(parents=True)
        path.write_text("before\n")
    monkeypatch.setattr(environment, "__file__", str(code[0]))
    assert environment.commit() is None
    for command in ("init --quiet", "add .", "commit --quiet --message first"):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command.split()], cwd=tmp_path, check=True)
    (tmp_path / "benches" / "results").mkdir()
    (tmp_path / "benches" / "results" / "new.json").touch()
    head = environment.commit()
    assert len(head) == 12
    for path in code:
        path.write_text("after\n")
        assert environment.commit() == f"{head}+changes"
        path.write_text("before\n")
    (tmp_path / "benches" / "new.py").touch()
    assert environment.commit() == f"{head}+changes"


@pytest.mark.usefixtures("empty_cache")
def test_a_gpu_is_named_with_its_driver_and_its_tuning_results(monkeypatch):
    def facts():
        return environment.environment(torch.device("cuda"))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("fastlora.kernels.target.target_of", lambda device: GPU)
    printed = {"nvidia-smi": "580.1\n580.1\n"}  # a line for each GPU
    monkeypatch.setattr(subprocess, "run", lambda command, **options: mock.Mock(stdout=printed.get(command[0], "")))
    expected = {"device": GPU.name, "capability": "sm_90", "driver": "580.1", "tuned": None}
    assert facts().items() >= expected.items()
    tuned = []
    for choice in ("fused", "addmm", "addmm"):
        dispatch.store(GPU, {LARGE: choice})
        tuned.append(facts()["tuned"])
    assert None not in tuned
    assert tuned[0] != tuned[1] == tuned[2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert facts()["tuned"] is None
