"""Files that are whole at every moment."""

import os
from pathlib import Path


def write(path: Path, content: bytes, *, locked: bool = False) -> None:
    """Put `content` at `path` in one step: readers and a crash see the old file or the new one, never a part.

    A writer that is killed leaves `.name.pid.tmp` beside it, for good: whether its process lives cannot be told from another
    machine, or another container.  Where the caller holds a lock that all writers of `path` take (`locked`), there is but one
    `.name.tmp`, which the next write takes over.
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
