"""Damaged adapter files: what loads is what the file says, whatever else is an error that is documented and changes nothing.

The format has no checksum: a flipped bit in a tensor's data is another tensor, and loads as such.  So an independent reader of
the format judges what was loaded.
"""

import json
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastlora import from_pretrained, inject, load_adapter, save_adapter
from soak.damage import cut, flip, garbage, header, nested, options

pytestmark = pytest.mark.usefixtures("torch_backend")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS: dict[str, Any] = {"target_modules": ["body.0", "body.2"], "r": 3, "lora_alpha": 5, "bias": "lora_only"}
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I32": np.int32, "BF16": None}
Files = dict[str, bytes]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)


def read(data: bytes) -> dict[str, np.ndarray]:
    """The float tensors of a weights file, by the description of the format."""
    (length,) = struct.unpack("<Q", data[:8])
    body, tensors = data[8 + length :], {}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            raw = body[start:end]
            bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16 if entry["dtype"] == "BF16" else None
            values = np.frombuffer(raw, DTYPES[entry["dtype"]]) if bits is None else bits.view(np.float32)
            tensors[key] = values.reshape(entry["shape"])
    return tensors


def state(model: nn.Module) -> list[Any]:
    """All that a failed call must leave as it was: every bit of every tensor among it."""
    tensors = [
        (n, id(t), t._version, t.requires_grad, t.detach().numpy().tobytes())
        for n, t in model.state_dict(keep_vars=True).items()
    ]
    return [tensors, dict(model.named_modules()), [m.training for m in model.modules()], vars(model).get("lora_options")]


def assert_holds(model: nn.Module, files: Files) -> None:
    """The model computes with what the two files say."""
    said = json.loads(files[CONFIG])
    for key, values in read(files[WEIGHTS]).items():
        path, _, name = (
            key.removeprefix("base_model.model.").replace(".base_layer.", ".").removesuffix(".weight").rpartition(".")
        )
        tensor = getattr(model.get_submodule(path), name).detach().numpy()
        assert np.array_equal(tensor, values.astype(tensor.dtype), equal_nan=True), key
    layer = model.body[0] if hasattr(model.body[0], "r") else model.body[2]
    patterns = bool(said.get("rank_pattern")) or bool(said.get("alpha_pattern"))
    if not patterns:
        rank, alpha = said.get("r") or 8, said.get("lora_alpha")
        alpha = 8 if alpha is None else alpha
        assert layer.scaling == alpha / (rank**0.5 if said.get("use_rslora") else rank)


CHANGES: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    WEIGHTS: [flip, cut, garbage, header, header, nested],
    CONFIG: [flip, cut, garbage, options, options, options, nested],
}


@pytest.mark.parametrize("target", [WEIGHTS, CONFIG])
def test_fuzzed_files(target: str, tmp_path: Path, counted) -> None:
    source, kinds = random.Random(0), {"loaded": 0, "refused": 0}
    save_adapter(inject(Network(), **OPTIONS), tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    prepared, plain = inject(Network(), **OPTIONS), Network()
    warnings.simplefilter("ignore")
    for number in counted(10_000):
        changed = source.choice(CHANGES[target])(whole[target], source)
        (tmp_path / target).write_bytes(changed)
        anew = number % 2
        model = plain if anew else prepared
        before, documented = state(model), (ValueError, TypeError) if anew else ValueError
        try:
            from_pretrained(model, tmp_path) if anew else load_adapter(model, tmp_path)
        except documented:
            assert state(model) == before, (number, changed)
            kinds["refused"] += 1
        except BaseException as error:
            raise AssertionError((number, changed[:3000])) from error
        else:
            assert_holds(model, whole | {target: changed})
            kinds["loaded"] += 1
            prepared, plain = inject(Network(), **OPTIONS), Network()
    print(kinds, end="")
    assert all(kinds.values())
