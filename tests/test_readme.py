"""The README's Python blocks run, one after the other, as a reader would run them."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["y"].shape == (32, 96)
    assert (tmp_path / "build/adapter/adapter_model.safetensors").is_file()
