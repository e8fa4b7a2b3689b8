"""Adapter files that are broken, foreign or hostile: a clear error, and a model that is as it was."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import gpt2, llama, logits, randomise, roberta, tied_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastlora import from_pretrained, inject, load_adapter, save_adapter

safetensors_torch = pytest.importorskip("safetensors.torch")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS: dict[str, Any] = {"target_modules": ["query", "value"], "r": 4, "bias": "all", "modules_to_save": ["classifier"]}
PREFIX = "base_model.model."
Q0 = PREFIX + "roberta.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(randomise(inject(roberta(), **OPTIONS)), tmp_path)
    return tmp_path


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = safetensors_torch.load((folder / WEIGHTS).read_bytes())
        change(held)
        safetensors_torch.save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / WEIGHTS)

    return edit


def of_another_model(folder: Path) -> None:
    save_adapter(randomise(inject(llama(), target_modules=["q_proj"], r=4)), folder)


def of_a_wider_model(folder: Path) -> None:
    tensors(lambda t: t.update({key: tensor.repeat_interleave(2, 0) for key, tensor in t.items() if "lora_B" in key}))(folder)


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "truncated": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), ValueError, "not a whole safetensors"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), ValueError, "not a whole safetensors"),
    "longer": (lambda f: (f / WEIGHTS).open("ab").write(b"x"), ValueError, "not a whole safetensors"),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({})), ValueError, "not a whole safetensors"),
    "only a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), FileNotFoundError, "a pickle, is never read"),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), ValueError, "not a JSON file"),
    "missing bias": (tensors(lambda t: t.pop(Q0 + ".base_layer.bias")), ValueError, rf"lacks 1 keys.*{Q0}\.base_layer\.bias"),
    "missing module": (
        tensors(lambda t: t.pop(PREFIX + "classifier.dense.weight")),
        ValueError,
        r"lacks 1 .*classifier\.dense",
    ),
    "missing and more": (
        tensors(lambda t: t.update({"more": t.pop(Q0 + ".lora_A.weight")})),
        ValueError,
        rf"lacks 1 keys that this model has, such as '{Q0}\.lora_A\.weight', and has 1 keys .*such as 'more'",
    ),
    "another copy": (tensors(lambda t: t.update({PREFIX + "pooler.original_module.bias": torch.ones(1)})), ValueError, "has 1"),
    "shape of a bias": (
        tensors(lambda t: t.update({Q0 + ".base_layer.bias": torch.ones(17)})),
        ValueError,
        r"base_layer\.bias' has shape \(17,\), expected \(16,\)",
    ),
    "rank": (of_a_wider_model, ValueError, r"lora_B\.weight' has shape \(32, 4\), expected \(16, 4\)"),
    "rank in the config": (config(r=5), ValueError, "r=5, but the layer .* has r=4"),
    "precision": (
        tensors(lambda t: t.update({PREFIX + "classifier.dense.bias": torch.ones(16).double()})),
        ValueError,
        r"classifier\.dense\.bias' is torch\.float64, which torch\.float32 cannot",
    ),
    "bias mode": (config(bias="lora_only"), ValueError, "bias='lora_only', but the model was injected with bias='all'"),
    "null modules": (config(modules_to_save=None), ValueError, r"modules_to_save=\[\], but the model .*differ in classifier"),
    "other modules": (config(modules_to_save=["pooler", "embeddings"]), ValueError, "modules_to_save=.* they differ in "),
    "modules of another type": (
        config(modules_to_save={"a": 1}),
        ValueError,
        "modules_to_save must be .* a list of strings, got {'a': 1}",
    ),
    "modules without names": (
        config(modules_to_save=[1]),
        ValueError,
        r"modules_to_save must be .* a list of strings, got \[1\]",
    ),
    "alpha of another type": (config(lora_alpha=True), ValueError, "lora_alpha must be a float, got bool True"),
    "trainable tokens": (config(trainable_token_indices=[1]), ValueError, r"trainable_token_indices=\[1\] is not supported"),
    "another model": (of_another_model, ValueError, "bias='none', but the model was injected with bias='all'"),
}


def state(model: nn.Module) -> list[Any]:
    """All that a failed call must leave as it was."""
    tensors = [(name, id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()]
    return [tensors, dict(model.named_modules()), [m.training for m in model.modules()], vars(model).get("lora_options")]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_changes_nothing(case: str, folder: Path) -> None:
    tamper, error, message = BROKEN[case]
    model = inject(roberta(), **OPTIONS)
    before = state(model)
    load_adapter(inject(roberta(), **OPTIONS), folder)
    tamper(folder)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert state(model) == before


# What names no layer of the model, or only disagrees with how another model was injected, is no error of its own here.
CONSISTENT = {"rank in the config", "bias mode", "null modules", "other modules", "another model"}
DIFFERENT = {
    "rank in the config": r"lora_A\.weight' has shape \(4, 16\), expected \(5, 16\)",
    "bias mode": r"has \d+ keys that this model lacks",
    "null modules": r"has \d+ keys that this model lacks",
    "other modules": "lacks",
    "another model": "matches no module of the model",
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_from_pretrained_of_a_broken_file_changes_nothing(case: str, folder: Path) -> None:
    tamper, error, message = BROKEN[case]
    tamper(folder)
    model = roberta().train()
    model.roberta.pooler = None
    before = state(model)
    with pytest.raises(error, match=DIFFERENT.get(case, message)):
        from_pretrained(model, folder)
    assert state(model) == before


@pytest.mark.parametrize("changes", [{"target_modules": None}, {"target_modules": []}, {"target_modules": 3}, {"bias": "most"}])
def test_from_pretrained_with_a_config_that_says_nothing(changes: dict[str, Any], folder: Path) -> None:
    config(**changes)(folder)
    model = roberta()
    before = state(model)
    with pytest.raises(ValueError, match=r"target_modules|bias must be one of"):
        from_pretrained(model, folder)
    assert state(model) == before


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2500), byte=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0, 20000)))
def test_a_damaged_header_is_an_error_or_harmless(place: int, byte: int, cut: int | None, folder: Path) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] = byte
    path.write_bytes(damaged[:cut])
    model = DAMAGED.setdefault("model", inject(roberta(), **OPTIONS))
    before = state(model)
    try:
        load_adapter(model, folder)
    except ValueError:
        assert state(model) == before
    finally:
        path.write_bytes(whole)


DAMAGED: dict[str, nn.Module] = {}


def test_a_half_loaded_model_is_told(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = roberta()
    inject(empty, **OPTIONS)
    with pytest.raises(ValueError, match=r"the weight of 'roberta\..*query' is on the meta device"):
        load_adapter(empty, folder)
    with pytest.raises(ValueError, match=r"the weight of 'roberta\..*query' is on the meta device"):
        save_adapter(empty, tmp_path / "new")
    half = inject(roberta(), **OPTIONS)
    half.classifier.out_proj.to("meta")
    before = {name: t.detach().clone() for name, t in half.named_parameters() if not t.is_meta}
    message = r"half loaded: 2 tensors such as 'base_model\.model\.classifier\.out_proj"
    with pytest.raises(ValueError, match=message):
        load_adapter(half, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.named_parameters() if name in before)
    with pytest.raises(ValueError, match=message):
        save_adapter(half, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with torch.device("meta"):
        empty = roberta()
    with pytest.raises(ValueError, match="on the meta device"):
        from_pretrained(empty, folder)
    assert not hasattr(empty, "lora_options")


def test_no_path_inside_the_config_is_followed(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = str(tmp_path / "elsewhere" / "model")
    config(base_model_name_or_path=other, revision=other, auto_mapping={"parent_library": other}, megatron_core=other)(folder)
    opened = []
    real = io.open

    def recording(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(os.fspath(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", recording)
    monkeypatch.setattr("builtins.open", recording)
    load_adapter(inject(roberta(), **OPTIONS), folder)
    from_pretrained(roberta(), folder)
    assert {Path(path).name for path in opened} == {CONFIG, WEIGHTS}
    assert {Path(path).parent for path in opened} == {folder}


def test_embeddings_that_differ_but_are_tied_here_are_refused(tmp_path: Path) -> None:
    save_adapter(inject(tied_llama(), target_modules=["q_proj"], r=4), tmp_path)
    embeddings = {PREFIX + "model.embed_tokens.weight": torch.ones(40, 16), PREFIX + "lm_head.weight": torch.zeros(40, 16)}
    tensors(lambda t: t.update(embeddings))(tmp_path)
    model = tied_llama()
    before = state(model)
    with pytest.raises(ValueError, match="differ, but are tied in this model"):
        from_pretrained(model, tmp_path)
    assert state(model) == before
    untied = from_pretrained(llama(), tmp_path)
    assert torch.equal(untied.lm_head.weight, torch.zeros(40, 16))
    assert torch.equal(untied.model.embed_tokens.weight, torch.ones(40, 16))


def test_from_pretrained_of_an_injected_model_is_refused(folder: Path) -> None:
    model = inject(roberta(), **OPTIONS)
    with pytest.raises(ValueError, match="holds 4 LoRA linears already"):
        from_pretrained(model, folder)
    with pytest.raises(ValueError, match="matches no module"):
        from_pretrained(gpt2(), folder)


def test_a_pattern_that_peft_reordered_is_told(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it saves: where two match a layer, its file no longer says what was trained."""
    options: dict[str, Any] = {"target_modules": ["query"], "r": 4, "alpha_pattern": {"query": 3, ".*0.*": 5}}
    peft.get_peft_model(roberta(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_alpha=5, but the layer '.*0\..*query' has lora_alpha=3"):
        load_adapter(inject(roberta(), **options), tmp_path)
    model = inject(roberta(), **options)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)


def test_a_compiled_model_has_the_names_of_its_original(tmp_path: Path) -> None:
    model = randomise(inject(llama(), target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    compiled = torch.compile(model)
    save_adapter(compiled, tmp_path)
    assert torch.equal(logits(from_pretrained(llama(), tmp_path)), logits(model))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    load_adapter(compiled, tmp_path)
    assert model.lm_head.weight.any()
