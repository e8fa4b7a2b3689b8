"""These tests compile kernels for GPUs with the repository's own tools, which are not installed with the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
