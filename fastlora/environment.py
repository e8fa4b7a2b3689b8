"""Where a figure comes from: versions, commit and device."""

import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlora import backends
from fastlora._version import __version__

PACKAGES = ("torch", "triton", "peft", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """What a timing depends on: the code, the versions and the device."""
    known = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "fastlora": __version__}
    known |= dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            known[package] = metadata.version(package)
    known["python"] = platform.python_version()
    if device.type == "cpu":
        return {**known, "device": _processor(), "threads": torch.get_num_threads()}
    tuned = None  # a fingerprint of the tuning results that the kernels use
    if "triton" in backends.available_backends(device):
        from fastlora import dispatch  # imports Triton, as does the next
        from fastlora.kernels.target import target_of

        tuned = dispatch.fingerprint(target_of(device))
    return {
        **known,
        "device": torch.cuda.get_device_name(device),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "tuned": tuned,
    }


def commit() -> str | None:
    """The commit of the imported source tree, with "+changes" where its code differs from it; None outside a repository.

    In benches/ only code counts: new results must not keep a run from being resumed.
    """
    root = Path(__file__).parents[1]
    head = _first_line("git", "-C", str(root), "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    changes = head and _first_line("git", "-C", str(root), "status", "--porcelain", "--", "fastlora", "kernels", "benches/*.py")
    return f"{head}+changes" if changes else head


def _first_line(*command: str) -> str | None:
    """The first line that a program prints; None where the program is missing, fails or prints nothing."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(printed.splitlines()), None)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
