"""Files that are replaced: whole ones only, and no old one beside a new one."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlora import atomic

OLD, NEW = {"a": b"old", "b": b"old", "same": b"same"}, {"a": b"new", "b": b"new", "same": b"same"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    atomic.write_together({folder / name: content for name, content in files.items()})


def failing_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count()

    def replacement(*arguments: Any) -> Any:
        if next(numbers) == call:
            raise OSError("no space")
        return real(*arguments)

    return replacement


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.parametrize(
    ("call", "expected"),
    list(enumerate([OLD, OLD, {"a": b"new", "same": b"same"}, NEW])),
    ids=["aside", "first", "second", "third"],
)
def test_a_failure_leaves_no_old_file_beside_a_new_one(
    call: int, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OLD)
    monkeypatch.setattr(os, "replace", failing_at(call, os.replace))
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, NEW)
    assert contents(tmp_path) == expected


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OLD)
    monkeypatch.setattr(os, "fsync", failing_at(1, os.fsync))
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, NEW)
    assert contents(tmp_path) == OLD


def test_all_are_new_at_the_end(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    write(tmp_path, NEW)
    assert contents(tmp_path) == NEW
