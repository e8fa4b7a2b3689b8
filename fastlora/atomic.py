"""`write`: replace a file in one step. `write_together`: replace files that belong together."""

import os
from collections.abc import Mapping
from pathlib import Path


def write(path: Path, content: bytes, *, locked: bool = False) -> None:
    """Replace `path` by `content` atomically: readers, and a crash, see the old file or the new one, never a part.

    The content goes to a temporary file beside `path` first.  A killed writer leaves this file behind: `.name.pid.tmp`, or
    `.name.tmp` with `locked`.  Set `locked` when the caller holds a lock that every writer of `path` takes: the temporary file
    then has one name, and the next write overwrites a leftover.
    """
    write_together({path: content}, locked=locked)


def write_together(contents: Mapping[Path, bytes], *, locked: bool = False) -> None:
    """Replace each path by its content, see `write`: readers, and a crash, never see an old file beside a new one.

    They see all the old files, all the new ones, or no longer some whose content changes: each of those, but the first, is
    moved to `.name.old` beforehand.  An error before the first path is new leaves all files as they were; every temporary file
    is whole on disk by then, so a full disk is such an error.
    """
    owner = "" if locked else f".{os.getpid()}"
    temporaries = {path.with_name(f".{path.name}{owner}.tmp"): path for path in contents}
    aside: dict[Path, Path] = {}
    try:
        for temporary, path in temporaries.items():
            with open(temporary, "wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path in list(contents)[1:]:
            if path.exists() and path.read_bytes() != contents[path]:
                os.replace(path, old := path.with_name(f".{path.name}.old"))
                aside[old] = path
        for temporary, path in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        if next(iter(temporaries)).exists():
            for old, path in aside.items():
                os.replace(old, path)
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    for old in aside:
        old.unlink()
