"""The file of measured choices: damaged or foreign, in a cache that cannot be used, interrupted or shared, it does no harm."""

import functools
import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from tuned import GPU, LARGE, TILE, TILED, problems

from fastlora import atomic, dispatch
from fastlora.dispatch import choose, default_choice, store

pytestmark = pytest.mark.usefixtures("empty_cache")

OTHER = replace(LARGE, r=8)


def edited(change):
    """A change of the file's text that lets `change` edit its content."""

    def edit(text):
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edit


def of_environment(**changes):
    return edited(lambda data: data["environment"].update(changes))


BAD = {
    "empty": (lambda text: "", "Expecting value"),
    "truncated": (lambda text: text[: len(text) // 2], ""),
    "not text": (lambda text: b"\xff\xfe\x00", "utf-8"),
    "null": (lambda text: "null", "no choices"),
    "nested": (lambda text: "[" * 100_000, ""),
    "no environment": (edited(lambda data: data.pop("environment")), "it is for None"),
    "no choices": (edited(lambda data: data.update(results=[], choices=None)), "no choices"),
    "another GPU": (of_environment(gpu="Test GPU 9001"), "Test GPU 9001"),
    "another torch": (of_environment(torch="2.0.0"), "'torch': '2.0.0'"),
    "another format": (of_environment(format=2), "'format': 2"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_ignored_with_a_warning(spoil, reason):
    """The warning says why and comes once, and the next store writes the file anew."""
    path = store(GPU, {LARGE: TILED, OTHER: TILED})
    bad = spoil(path.read_text())
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    dispatch.forget()
    asked = (LARGE, OTHER, *problems(3)) * 2
    with pytest.warns(UserWarning, match=f"is ignored: .*{reason}.*`fastlora tune`") as caught:
        taken = [choose(problem, GPU) for problem in asked]
    assert taken == [default_choice(problem, GPU) for problem in asked]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store(GPU, {OTHER: TILED})
    assert dispatch.stored(GPU) == {str(OTHER): TILED}


@pytest.mark.parametrize("choice", ["magic", "torch", f"addmm/{TILE}", "fused/128,256,64,32,8,4,8", "fused/128", ["fused"], 3])
def test_a_choice_that_a_problem_cannot_take_is_ignored(choice):
    path = store(GPU, {LARGE: TILED, OTHER: TILED})
    path.write_text(edited(lambda data: data["choices"].update({str(LARGE): choice}))(path.read_text()))
    dispatch.forget()
    with pytest.warns(UserWarning, match="is ignored: forward bfloat16 8192 x 4096 -> 4096 r=16 with dropout cannot take it"):
        assert choose(LARGE, GPU) == default_choice(LARGE, GPU)
    assert choose(OTHER, GPU) == TILED


@pytest.mark.parametrize("trouble", ["folder is a file", "file is a folder", "may not be read", "no home"])
def test_a_cache_that_cannot_be_used(trouble, empty_cache, monkeypatch):
    def refuse(*args, **options):
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
        (replace(LARGE, in_features=4095), TILED),  # rows of x are not aligned: no descriptors
    ],
)
def test_what_would_not_be_read_is_not_written(problem, choice):
    path = store(GPU, {OTHER: TILED})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot take the choice"):
        store(GPU, {problem: choice})
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_store_leaves_the_old_file(moment, error, monkeypatch):
    path = store(GPU, {LARGE: TILED})
    before, names = path.read_bytes(), sorted(path.parent.iterdir())

    def interrupt(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            store(GPU, {OTHER: TILED})
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    store(GPU, {OTHER: TILED})
    assert len(dispatch.stored(GPU)) == 2


def in_processes(*functions):
    """Run them at once, each in a process of its own; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_killed_store_leaves_the_old_file():
    """Killed between writing and replacing, holding the lock; what it had written is gone with the next store."""
    path = store(GPU, {LARGE: TILED})
    before, names = path.read_bytes(), sorted(path.parent.iterdir())

    def killed():
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        store(GPU, {OTHER: TILED})

    for _ in range(2):
        assert in_processes(killed) == [-signal.SIGKILL]
        assert path.read_bytes() == before
        assert len(list(path.parent.iterdir())) == len(names) + 1  # what it had written
    store(GPU, {OTHER: TILED})
    assert sorted(path.parent.iterdir()) == names
    assert dispatch.stored(GPU).keys() == {str(LARGE), str(OTHER)}


def test_writers_without_a_lock_do_not_meet(tmp_path, monkeypatch):
    """As two ranks that save one adapter: the second writes all of it while the first is about to replace."""
    path, right = tmp_path / "file", os.replace

    def replace_late(source, target):
        monkeypatch.setattr(os, "replace", right)
        assert in_processes(lambda: atomic.write(path, b"second")) == [0]
        assert path.read_bytes() == b"second"
        right(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    atomic.write(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_store_at_once_keep_all():
    everything = problems(24)

    def store_each(these):
        for problem in these:
            store(GPU, {problem: TILED})

    writers = [functools.partial(store_each, everything[first::3]) for first in range(3)]
    assert in_processes(*writers) == [0] * 3
    assert set(dispatch.stored(GPU)) == set(map(str, everything))
