"""Adapter files: what is written, what is refused, and that nothing half-written or ill-fitting gets through."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import llama, logits, randomise
from torch import nn

from fastlora import FusedLoraLinear, from_pretrained, inject, load_adapter, save_adapter

safetensors_torch = pytest.importorskip("safetensors.torch")

OPTIONS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 12}
LAST = "model.layers.1.mlp.down_proj"


def injected(**options: Any) -> nn.Module:
    return randomise(inject(llama(), **OPTIONS | options))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_file_holds_pefts_keys_in_the_training_dtype(tmp_path: Path) -> None:
    save_adapter(inject(llama().bfloat16(), **OPTIONS, adapter_dtype=torch.float32), tmp_path / "new" / "folder")
    tensors = safetensors_torch.load_file(tmp_path / "new" / "folder" / "adapter_model.safetensors")
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if ".0." in key} == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (torch.float32, (4, 16)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (torch.float32, (16, 4)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": (torch.float32, (4, 24)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (torch.float32, (16, 4)),
    }


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    save_adapter(injected(), tmp_path)
    before = files(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(injected(r=2), tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize(("keep_base", "remedy"), [(True, r"unmerge\(\) it first"), (False, "dropped the base weight")])
def test_loading_into_a_merged_layer_is_refused(tmp_path: Path, keep_base: bool, remedy: str) -> None:
    save_adapter(injected(), tmp_path)
    model = inject(llama(), **OPTIONS)
    before = model.state_dict()
    layer = model.get_submodule(LAST)
    layer.merge(keep_base)
    with pytest.raises(RuntimeError, match=f"'{LAST}' is merged.*{remedy}"):
        load_adapter(model, tmp_path)
    assert not layer.lora_B.any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if keep_base:
        layer.unmerge()
        load_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(injected()))


def test_saving_a_merged_layer_needs_its_base_weight(tmp_path: Path) -> None:
    model = injected()
    save_adapter(model, tmp_path / "unmerged")
    model.get_submodule(LAST).merge()
    save_adapter(model, tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "unmerged")
    model.get_submodule(LAST).unmerge()
    model.get_submodule(LAST).merge(keep_base=False)
    with pytest.raises(RuntimeError, match=f"'{LAST}' is merged.*dropped the base weight"):
        save_adapter(model, tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()


def test_model_without_adapters_or_with_unequal_ones(tmp_path: Path) -> None:
    for function, model in product((save_adapter, load_adapter), (llama(), FusedLoraLinear(4, 4, r=0))):
        with pytest.raises(ValueError, match="holds no LoRA layer"):
            function(model, tmp_path / "a")
    mixed = nn.ModuleList([FusedLoraLinear(4, 4, r=1), FusedLoraLinear(4, 4, r=1, lora_dropout=0.5)])
    with pytest.raises(ValueError, match=r"differ in lora_dropout: \[0.0, 0.5\]"):
        save_adapter(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_file", [torch.float32, torch.bfloat16])
def test_dtypes_of_a_loaded_adapter(half: torch.dtype, in_file: torch.dtype, tmp_path: Path) -> None:
    source = randomise(inject(llama().to(in_file), target_modules=["q_proj"], r=4))
    save_adapter(source, tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    layer = from_pretrained(llama().to(half), tmp_path).get_submodule(name)
    assert (layer.weight.dtype, layer.lora_A.dtype) == (half, half if in_file == half else torch.float32)
    assert torch.equal(layer.lora_A.float(), source.get_submodule(name).lora_A.float())
    assert from_pretrained(llama(), tmp_path).get_submodule(name).lora_A.dtype == torch.float32
    wide = inject(llama(), target_modules=["q_proj"], r=4)
    load_adapter(wide, tmp_path)
    assert torch.equal(wide.get_submodule(name).lora_A, source.get_submodule(name).lora_A.float())


def test_a_shared_linear_is_saved_once(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(3, 3)
        return nn.ModuleDict({"a": linear, "b": linear})

    model = randomise(inject(build(), target_modules=["a", "b"], r=1, bias="all"))
    save_adapter(model, tmp_path)
    keys = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    names = ("a.lora_A.weight", "a.lora_B.weight", "a.base_layer.bias", "b.bias")
    assert keys == {f"base_model.model.{name}" for name in names}
    loaded = from_pretrained(build(), tmp_path)
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["a"].lora_B, model["a"].lora_B)


def test_a_trainable_parameter_outside_of_the_file_is_told(tmp_path: Path) -> None:
    model = inject(llama(), target_modules=["q_proj"], r=2)
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 trainable parameters such as 'model\.norm\.weight' are not part") as caught:
        save_adapter(model, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
