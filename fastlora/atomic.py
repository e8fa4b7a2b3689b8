"""Files that are whole at every moment."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: readers and a crash see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
