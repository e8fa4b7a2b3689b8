"""How the tests run: in which mode of Triton, with which draws of hypothesis, and with no uninitialised memory.

Triton reads TRITON_INTERPRET once, when kernels are imported, so one process has one mode.  It follows from what is asked for:

    pytest                  the kernels run under Triton's interpreter, on a CPU
    pytest tests/compile    the kernels are compiled for GPUs, and not run
    pytest -m gpu           the compiled kernels run on this machine's GPU
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

COMPILE_TESTS = Path(__file__).parent / "compile"
GPU_TESTS = Path(__file__).parent / "gpu" / "test_gpu.py"
INTERPRETED = pytest.StashKey[bool]()
ON_GPU = pytest.StashKey[bool]()
ALLOCATIONS = ("empty", "empty_like", "empty_permuted", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)  # pytest --hypothesis-profile=explore
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    compiling = {COMPILE_TESTS in (path, *path.parents) for path in _asked_for(config)}
    if compiling == {True, False}:
        raise pytest.UsageError("tests/compile runs without Triton's interpreter: give it a pytest process of its own")
    config.stash[ON_GPU] = on_gpu = config.option.markexpr.split()[:1] == ["gpu"]
    config.stash[INTERPRETED] = not on_gpu and compiling != {True}
    if config.stash[INTERPRETED]:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests where there is a GPU
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def _asked_for(config: pytest.Config) -> list[Path]:
    return [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.stash[INTERPRETED]:
        return True if collection_path == COMPILE_TESTS else None
    if config.stash[ON_GPU] and collection_path.suffix == ".py":
        return True if collection_path != GPU_TESTS else None  # the others need packages that a GPU machine may lack
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if config.stash[INTERPRETED]:
        reason = "the kernels are interpreted in this process; run pytest -m gpu"
    elif not torch.cuda.is_available():
        reason = "no CUDA GPU"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes what the user has measured."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FASTLORA_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def fused_at_any_size() -> Iterator[None]:
    """Small calls on a CPU are not left to PEFT's forward: the models of the tests are small."""
    from fastlora import torch_backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "BREAK_EVEN", 0)
        yield


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet, and a process that has not looked at it."""
    from fastlora import dispatch

    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "cache"))
    dispatch.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the interpreter stands for, under a name: the tuner keeps nothing of a GPU without one."""
    from tuned import NAMED

    from fastlora.kernels import target

    monkeypatch.setattr(target, "INTERPRETER", NAMED)
    return NAMED


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of projections of each call that a group makes."""
    from fastlora import lora_linears
    from fastlora.blocks import sharing

    made: list[int] = []

    def counting(x: Any, projections: Any, **options: Any) -> Any:
        made.append(len(projections))
        return lora_linears(x, projections, **options)

    monkeypatch.setattr(sharing, "lora_linears", counting)
    return made


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what the package allocates without initialising it, so that an element no kernel wrote cannot pass for a result."""
    import torch

    with torch.device("meta"):
        torch.empty(0)  # torch lists what a device applies to at the first call, which must not be the poisoned torch.empty
    with pytest.MonkeyPatch.context() as patch:
        for name in ALLOCATIONS:
            patch.setattr(torch, name, _poisoning(getattr(torch, name)))
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))
        yield


@pytest.fixture
def unpoisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations as they are, for tests that count what torch runs: poison is memory that torch has filled."""
    import torch

    for name in ALLOCATIONS:
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, getattr(torch._C.TensorBase, name))


def _poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo cannot trace the look at the caller's frame
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "fastlora":
            tensor.detach().fill_(_poison(tensor.dtype))
        return tensor

    return poisoned


def _poison(dtype: Any) -> float | int:
    """NaN, or every byte 0xA5 (True for bool)."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return int.from_bytes(b"\xa5" * dtype.itemsize, "little", signed=dtype.is_signed)
