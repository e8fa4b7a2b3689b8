"""A file of choices that cannot be believed, a folder that cannot be used, a store that is interrupted: no harm is done."""

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
from tuned import GPU, LARGE, TILE, TILED, forget, problems

from fastlora import atomic, choices
from fastlora.kernels.forms import Choice, Problem, default_choice
from fastlora.kernels.target import INTERPRETER

pytestmark = pytest.mark.usefixtures("empty_cache")


# Files that cannot be believed


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


BAD: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "last byte gone": lambda text: text.rstrip()[:-1],
    "not text": lambda text: b"\xff\xfe\x00",
    "null": lambda text: "null",
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "no environment": edited(lambda data: data.pop("environment")),
    "no results": edited(lambda data: data.pop("results")),
    "results are no list": edited(lambda data: data.update(results=3)),
    "a result is no record": edited(lambda data: data["results"].append([])),
    "another format": of_environment(format=choices.FORMAT + 1),
    "another GPU": of_environment(gpu="Test GPU 9001"),
    "another capability": of_environment(capability=80),
    "fewer multiprocessors": of_environment(multiprocessors=131),
    "another torch": of_environment(torch="2.0.0"),
    "another Triton": of_environment(triton="2.0.0"),
    "another fastlora": of_environment(fastlora="0.0.0"),
    "a field too many": of_record(extra=1),
    "a field too few": edited(lambda data: data["results"][1].pop("form")),
    "an unknown direction": of_record(direction="sideways"),
    "an unknown dtype": of_record(dtype="float64"),
    "a dtype that is no name": of_record(dtype=["bfloat16"]),
    "rows between powers of two": of_record(rows=8191),
    "no rows": of_record(rows=0),
    "true rows": of_record(rows=True),
    "a negative size": of_record(in_features=-4096),
    "a fractional rank": of_record(r=16.0),
    "dropout is a rate": of_record(dropout=0.1),
    "an unknown precision": of_record(precision="tf32"),
    "an unknown form": of_record(form="magic"),
    "torch cannot mask": of_record(form="torch", tile=None),
    "prefill has no tile": of_record(form="addmm"),
    "a tile of other numbers": of_record(tile=[100, 256, 64, 32, 8, 3, 8]),
    "a tile that spills": of_record(tile=[128, 256, 64, 32, 4, 3, 8]),
    "a tile that does not fit": of_record(tile=[128, 256, 64, 32, 8, 4, 8]),
    "half a tile": of_record(tile=[128, 256]),
    "a tile of no numbers": of_record(tile={"block_m": 128}),
    "a tile of fractions": of_record(tile=[128.0, 256, 64, 32, 8, 3, 8]),
    "a tile that needs descriptors": of_record(in_features=4095),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_ignored_with_one_warning(name: str) -> None:
    """And the next store writes it anew."""
    path = choices.store(GPU, {LARGE: TILED, replace(LARGE, r=8): TILED})
    bad = BAD[name](path.read_text())
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    forget()
    other = replace(LARGE, r=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for problem in (LARGE, replace(LARGE, r=8), *problems(3)) * 2:
            assert choices.choose(problem, GPU) == default_choice(problem, GPU)
        choices.store(GPU, {other: TILED})
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{path} is ignored: ")
    assert "`fastlora tune`" in message
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.choose(other, GPU) == TILED
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("another torch", "'torch': '2.0.0'"), ("an unknown form", "'magic'"), ("a tile that does not fit", "'num_stages': 4")],
)
def test_the_warning_says_why(name: str, reason: str) -> None:
    path = choices.store(GPU, {LARGE: TILED, replace(LARGE, r=8): TILED})
    path.write_text(BAD[name](path.read_text()))
    forget()
    with pytest.warns(UserWarning, match=reason):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


def test_a_file_from_elsewhere_is_foreign() -> None:
    other = replace(GPU, name="Another GPU")
    choices.store(other, {LARGE: TILED}).rename(choices.path_of(GPU))
    with pytest.warns(UserWarning, match="it is for .*Another GPU"):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


# Folders that cannot be used


def test_the_folder_is_a_file(empty_cache: Path) -> None:
    empty_cache.write_text("")
    with pytest.warns(UserWarning, match="is ignored: .*Not a directory"):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)
    with pytest.raises(OSError, match="cache"):
        choices.store(GPU, {LARGE: TILED})
    assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


def test_the_file_is_a_folder() -> None:
    choices.path_of(GPU).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored: .*Is a directory"):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    choices.store(GPU, {LARGE: TILED})
    forget()

    def refuse(path: Path, *options: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match="is ignored: .*Permission denied"):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTLORA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="is ignored: Could not determine home"):
        assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)
    assert choices.choose(replace(LARGE, r=8), GPU) == default_choice(LARGE, GPU)


# Storing


@pytest.mark.parametrize(
    ("problem", "choice"),
    [
        (LARGE, Choice("magic")),
        (LARGE, Choice("torch")),
        (LARGE, Choice("addmm", TILE)),
        (LARGE, Choice("fused", replace(TILE, num_stages=4))),
        (replace(LARGE, rows=100), TILED),
        (replace(LARGE, dtype=torch.float64), TILED),
    ],
)
def test_what_would_not_be_read_is_not_written(problem: Problem, choice: Choice) -> None:
    path = choices.store(GPU, {replace(LARGE, r=8): TILED})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"no problem|none that|no tile"):
        choices.store(GPU, {problem: choice})
    assert path.read_bytes() == before


def test_nothing_is_stored_without_a_name() -> None:
    with pytest.raises(ValueError, match=r"target\.name is empty"):
        choices.store(INTERPRETER, {})


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_store_leaves_the_old_file(moment: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = choices.store(GPU, {LARGE: TILED})
    before, names = path.read_bytes(), sorted(path.parent.iterdir())

    def interrupt(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            choices.store(GPU, {replace(LARGE, r=8): TILED})
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    assert choices.choose(replace(LARGE, r=8), GPU) == default_choice(LARGE, GPU)
    choices.store(GPU, {replace(LARGE, r=8): TILED})
    assert len(json.loads(path.read_text())["results"]) == 2


def in_processes(*functions: Callable[[], None]) -> list[int | None]:
    """Run them at once, each in a process of its own; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_killed_store_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between writing and replacing, holding the lock; what it had written is gone with the next store."""
    path = choices.store(GPU, {LARGE: TILED})
    before = path.read_bytes()

    def killed() -> None:
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        choices.store(GPU, {replace(LARGE, r=8): TILED})

    names = sorted(path.parent.iterdir())
    for _ in range(2):
        assert in_processes(killed) == [-signal.SIGKILL]
        assert path.read_bytes() == before
        assert len(list(path.parent.iterdir())) == len(names) + 1  # what it had written
    choices.store(GPU, {replace(LARGE, r=32): TILED})
    assert sorted(path.parent.iterdir()) == names
    assert {record["r"] for record in json.loads(path.read_text())["results"]} == {16, 32}


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
    each, writers = 25, 3
    everything = problems(each * writers)

    def writer(first: int) -> Callable[[], None]:
        def write() -> None:
            for problem in everything[first::writers]:
                choices.store(GPU, {problem: TILED})

        return write

    assert in_processes(*(writer(first) for first in range(writers))) == [0] * writers
    stored = json.loads(choices.path_of(GPU).read_text())["results"]
    assert {record["in_features"] for record in stored} == {problem.in_features for problem in everything}
