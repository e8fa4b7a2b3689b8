"""SOAK, the fraction of the full counts that a soak runs."""

import os

FRACTION = float(os.environ.get("SOAK") or 1)


def scaled(full: int) -> int:
    """`full` times SOAK, at least 1."""
    return max(1, round(full * FRACTION))
