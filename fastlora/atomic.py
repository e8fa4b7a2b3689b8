"""`write`: replace a file in one step."""

import os
from pathlib import Path


def write(path: Path, content: bytes, *, locked: bool = False) -> None:
    """Replace `path` by `content` atomically: readers, and a crash, see the old file or the new one, never a part.

    The content goes to a temporary file beside `path` first.  A killed writer leaves this file behind: `.name.pid.tmp`, or
    `.name.tmp` with `locked`.  Set `locked` when the caller holds a lock that every writer of `path` takes: the temporary file
    then has one name, and the next write overwrites a leftover.
    """
    owner = "" if locked else f".{os.getpid()}"
    temporary = path.with_name(f".{path.name}{owner}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
