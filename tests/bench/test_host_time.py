"""tools/host_time.py: it times every provider, and counts the launches that reach the stub."""

import json
import os
import subprocess
import sys

import pytest

from tools import host_time, stub_driver


def test_every_provider_is_timed():
    """In a process of its own: the kernels of this one are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.host_time", "--rounds", "2", "--json", "--dropout", "0"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if "no C compiler" in ran.stderr:
        pytest.skip(ran.stderr)
    results = json.loads(ran.stdout)
    assert list(results) == ["eager LoRA", "PEFT", "fastlora fused", "fastlora addmm", "fastlora", "fastlora fused at 4096"]
    for name, steps in results.items():
        forward, both = steps["forward"], steps["forward + backward"]
        assert 0 < forward["seconds"] < both["seconds"]
        assert (both["launches"] > forward["launches"] >= 0) == name.startswith("fastlora")


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(stub_driver.shutil, "which", lambda program: None)
    monkeypatch.delenv("CC", raising=False)
    stub_driver.library.cache_clear()
    assert host_time.main(["--rounds", "1"]) == 0
    assert capsys.readouterr().err == "host time is not measured: no C compiler: install gcc or clang, or name one in CC\n"
