"""One run of `pytest benches` at toy size, for all tests of what it writes."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the run, its own results, and what pytest-benchmark wrote."""
    pytest.importorskip("pytest_benchmark")
    from fastlora.benchmark import ceilings

    folder = tmp_path_factory.mktemp("results")
    saved = folder / "saved.bench"
    command = f"benches --grid toy --device cpu --benchmark-only --repeats 3 -s -p no:cacheprovider --results {folder}"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark refuses to run in such a worker
        patch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
        code = pytest.main([*command.split(), "--benchmark-json", str(saved)])
    assert code == 0, shown.getvalue()[-3000:]
    (file,) = folder.glob("*-toy.json")
    assert f"results: {file}" in shown.getvalue()
    assert "decoder layer: frozen" in shown.getvalue()
    return folder, json.loads(file.read_text()), json.loads(saved.read_text())
