"""Where a figure comes from: versions, commit and device."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlora import functional
from fastlora._version import __version__

PACKAGES = ("torch", "triton", "peft", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """What a timing depends on: the code, the versions and the device."""
    known: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "fastlora": __version__}
    known |= {name: _version(name) for name in PACKAGES}
    known["python"] = platform.python_version()
    if device.type == "cpu":
        return {**known, "device": _processor(), "threads": torch.get_num_threads()}
    return {
        **known,
        "device": torch.cuda.get_device_name(device),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "tuned": _tuned(device),
    }


def commit() -> str | None:
    """The commit of the imported source tree, with "+changes" where its code differs from it; None outside a repository.

    In benches/ only code counts: new results must not keep a run from being resumed.
    """
    root = Path(__file__).parents[1]
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    changes = head and _output("git", "-C", str(root), "status", "--porcelain", "--", "fastlora", "kernels", "benches/*.py")
    return f"{head}+changes" if changes else head


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _tuned(device: torch.device) -> str | None:
    """A fingerprint of the tuning results that the kernels use."""
    if "triton" not in functional.available_backends(device):
        return None
    from fastlora import dispatch
    from fastlora.kernels.target import target_of

    return dispatch.fingerprint(target_of(device))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
