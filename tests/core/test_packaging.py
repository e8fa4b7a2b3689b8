"""What is installed: the right modules under the right names, from a wheel and from an editable install."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch

import fastlora

ROOT = Path(__file__).parents[2]


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a new interpreter prints that starts in `cwd`."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def pip(*arguments: str | Path) -> None:
    python("-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without network from a copy of the sources, for setuptools leaves its build folders among them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("fastlora", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastlora").rglob("*.py")}
    sources |= {"fastlora/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert any(name.startswith("fastlora/kernels/") for name in sources)
    assert {name for name in names if ".dist-info/" not in name} == sources | {"fastlora/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    described = message_from_string(archive.read(name).decode())
    required = described.get_all("Requires-Dist", [])
    assert described["Version"] == fastlora.__version__
    assert {line for line in required if "extra ==" not in line} == {"torch>=2.11", "triton>=3.6"}


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


RUN = (
    "import torch, fastlora, fastlora.kernels.steps; one = torch.ones; print(fastlora.__file__, fastlora.__version__, "
    "fastlora.lora_linear(one(4, 16), one(16, 16), one(2, 16), one(16, 2), backend='fused').mean().item())"
)


@pytest.mark.parametrize("in_clone", [False, True], ids=["elsewhere", "in the clone"])
def test_installed_wheel_runs_the_kernels(site: Path, tmp_path: Path, in_clone: bool) -> None:
    """In the clone, Python finds the clone's package first."""
    found = (ROOT if in_clone else site) / "fastlora" / "__init__.py"
    printed = python("-c", RUN, cwd=ROOT if in_clone else tmp_path, PYTHONPATH=str(site), TRITON_INTERPRET="1")
    assert printed == f"{found} {fastlora.__version__} 48.0"


def test_kernels_hides_no_package_of_that_name(site: Path, tmp_path: Path) -> None:
    """transformers imports Hugging Face's package `kernels` where it is installed."""
    origin = "from importlib.util import find_spec; s = find_spec('kernels'); print(s and s.origin)"
    (tmp_path / "kernels").mkdir()
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.touch()
    for folder in (ROOT, site.parent):
        assert python("-c", origin, cwd=folder, PYTHONPATH=f"{site}:{tmp_path}") == str(theirs)


def test_a_torch_too_old_is_named(monkeypatch):
    """Instead of an AttributeError from deep inside."""
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(ImportError, match=r"^fastlora \S+ needs torch 2\.11 or newer, found torch 2\.10\.1\+cu128$"):
        runpy.run_path(str(ROOT / "fastlora" / "_version.py"))
    assert (ROOT / "fastlora" / "__init__.py").read_text().split("import ")[0].endswith("from fastlora._version ")
