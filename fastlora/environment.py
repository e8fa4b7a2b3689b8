"""Where a figure comes from: versions, commit and device."""

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastlora._version import __version__
from fastlora.functional import available_backends


def environment(device: torch.device) -> dict[str, Any]:
    """What a timing depends on besides the code, and which code it was."""
    known: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "fastlora": __version__}
    known |= {name: _version(name) for name in ("torch", "triton", "peft", "transformers")}
    known["python"] = platform.python_version()
    if device.type == "cuda":
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        return {
            **known,
            "device": torch.cuda.get_device_name(device),
            "capability": capability,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "tuned": _tuned(device),
        }
    return {**known, "device": _processor(), "threads": torch.get_num_threads()}


def commit() -> str | None:
    """The commit of the source tree that is imported, with "+changes" where its code differs from it; None outside of one.

    Of benches only the code counts: results that a run has written must not keep it from being resumed.
    """
    root = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    head, status = (
        subprocess.run([git, "-C", str(root), *command], capture_output=True, text=True, check=False)
        for command in (
            ["rev-parse", "--short=12", "HEAD"],
            ["status", "--porcelain", "--", "fastlora", "kernels", "benches/*.py"],
        )
    )
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "") if head.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()), None)


def _tuned(device: torch.device) -> str | None:
    """Which measured choices the kernels go by."""
    if "triton" not in available_backends(device):
        return None
    from fastlora import dispatch
    from fastlora.kernels.target import target_of

    return dispatch.fingerprint(target_of(device))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
