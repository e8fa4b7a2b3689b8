"""A file of measured choices that cannot be believed, a cache that cannot be used, an interrupted store: no harm is done."""

import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import GPU, LARGE, TILE, TILED, problems

from fastlora import atomic, dispatch
from fastlora.dispatch import Problem, choose, default_choice, store

pytestmark = pytest.mark.usefixtures("empty_cache")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edit


def of_record(**changes: Any) -> Callable[[str], str]:
    return edited(lambda data: data["results"][0].update(changes))


def of_environment(**changes: Any) -> Callable[[str], str]:
    return edited(lambda data: data["environment"].update(changes))


BAD: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda text: "", "Expecting value"),
    "truncated": (lambda text: text[: len(text) // 2], ""),
    "last byte gone": (lambda text: text.rstrip()[:-1], ""),
    "not text": (lambda text: b"\xff\xfe\x00", "utf-8"),
    "null": (lambda text: "null", "no list of results"),
    "nested": (lambda text: "[" * 100_000, ""),
    "no environment": (edited(lambda data: data.pop("environment")), "it is for None"),
    "no results": (edited(lambda data: data.pop("results")), "no list of results"),
    "a result is no record": (edited(lambda data: data["results"].append([])), "is no result"),
    "another GPU": (of_environment(gpu="Test GPU 9001"), "Test GPU 9001"),
    "another torch": (of_environment(torch="2.0.0"), "'torch': '2.0.0'"),
    "another format": (of_environment(format=2), "'format': 2"),
    "form and tile apart, as once": (of_record(form="prefill", tile=None), "expected .*precision and choice"),
    "a field too few": (edited(lambda data: data["results"][1].pop("r")), "is no result"),
    "an unknown direction": (of_record(direction="sideways"), "no problem"),
    "an unknown dtype": (of_record(dtype="float64"), "no problem"),
    "a dtype that is no name": (of_record(dtype=["bfloat16"]), "no problem"),
    "rows between powers of two": (of_record(rows=8191), "no problem"),
    "true rows": (of_record(rows=True), "no problem"),
    "a negative size": (of_record(in_features=-4096), "no problem"),
    "a fractional rank": (of_record(r=16.0), "no problem"),
    "dropout is a rate": (of_record(dropout=0.1), "no problem"),
    "an unknown precision": (of_record(precision="tf32"), "no problem"),
    "an unknown form": (of_record(choice="magic"), "'magic'"),
    "a choice that is no string": (of_record(choice=["fused"]), "fused"),
    "torch cannot mask": (of_record(choice="torch"), "'torch'"),
    "addmm has no tile": (of_record(choice=f"addmm/{TILE}"), "addmm/"),
    "a tile that does not fit": (of_record(choice="fused/128,256,64,32,8,4,8"), "8,4,8"),
    "half a tile": (of_record(choice="fused/128,256"), "128,256"),
    "a tile that needs descriptors": (of_record(in_features=4095), "none that"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_ignored_with_a_warning(name: str) -> None:
    """The warning says why and comes once, and the next store writes the file anew."""
    path = store(GPU, {LARGE: TILED, replace(LARGE, r=8): TILED})
    spoil, reason = BAD[name]
    bad = spoil(path.read_text())
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    dispatch.forget()
    asked = (LARGE, replace(LARGE, r=8), *problems(3)) * 2
    with pytest.warns(UserWarning, match=f"is ignored: .*{reason}.*`fastlora tune`") as caught:
        taken = [choose(problem, GPU) for problem in asked]
    assert taken == [default_choice(problem, GPU) for problem in asked]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store(GPU, {replace(LARGE, r=32): TILED})
    assert dispatch.stored(GPU) == {replace(LARGE, r=32): TILED}


@pytest.mark.parametrize("trouble", ["folder is a file", "file is a folder", "may not be read", "no home"])
def test_a_cache_that_cannot_be_used(trouble: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied") if trouble == "may not be read" else RuntimeError("no home directory")

    if trouble == "folder is a file":
        empty_cache.write_text("")
        with pytest.raises(OSError, match="cache"):
            store(GPU, {LARGE: TILED})
    elif trouble == "file is a folder":
        dispatch.path_of(GPU).mkdir(parents=True)
    elif trouble == "may not be read":
        monkeypatch.setattr(Path, "read_text", refuse)
    else:
        monkeypatch.delenv("FASTLORA_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", refuse)
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose(LARGE, GPU) == default_choice(LARGE, GPU)


@pytest.mark.parametrize(
    ("problem", "choice"),
    [
        (LARGE, "magic"),
        (LARGE, "torch"),
        (LARGE, f"addmm/{TILE}"),
        (LARGE, f"fused/{replace(TILE, num_stages=4)}"),
        (replace(LARGE, rows=100), TILED),
        (replace(LARGE, dtype=torch.float64), TILED),
    ],
)
def test_what_would_not_be_read_is_not_written(problem: Problem, choice: str) -> None:
    path = store(GPU, {replace(LARGE, r=8): TILED})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"no problem|none that"):
        store(GPU, {problem: choice})
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_store_leaves_the_old_file(moment: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(GPU, {LARGE: TILED})
    before, names = path.read_bytes(), sorted(path.parent.iterdir())

    def interrupt(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            store(GPU, {replace(LARGE, r=8): TILED})
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    store(GPU, {replace(LARGE, r=8): TILED})
    assert len(dispatch.stored(GPU)) == 2


def in_processes(*functions: Callable[[], None]) -> list[int | None]:
    """Run them at once, each in a process of its own; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_killed_store_leaves_the_old_file() -> None:
    """Killed between writing and replacing, holding the lock; what it had written is gone with the next store."""
    path = store(GPU, {LARGE: TILED})
    before = path.read_bytes()

    def killed() -> None:
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        store(GPU, {replace(LARGE, r=8): TILED})

    names = sorted(path.parent.iterdir())
    for _ in range(2):
        assert in_processes(killed) == [-signal.SIGKILL]
        assert path.read_bytes() == before
        assert len(list(path.parent.iterdir())) == len(names) + 1  # what it had written
    store(GPU, {replace(LARGE, r=32): TILED})
    assert sorted(path.parent.iterdir()) == names
    assert {problem.r for problem in dispatch.stored(GPU)} == {16, 32}


def test_writers_without_a_lock_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two ranks that save one adapter: the second writes all of it while the first is about to replace."""
    path, right = tmp_path / "file", os.replace

    def replace_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", right)
        assert in_processes(lambda: atomic.write(path, b"second")) == [0]
        assert path.read_bytes() == b"second"
        right(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    atomic.write(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_store_at_once_keep_all() -> None:
    each, writers = 8, 3
    everything = problems(each * writers)

    def writer(first: int) -> Callable[[], None]:
        def write() -> None:
            for problem in everything[first::writers]:
                store(GPU, {problem: TILED})

        return write

    assert in_processes(*(writer(first) for first in range(writers))) == [0] * writers
    assert set(dispatch.stored(GPU)) == set(everything)
