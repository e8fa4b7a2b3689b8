"""Adapter files that are broken, foreign or hostile: a clear error, and a model that is as it was."""

import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import llama, randomise, roberta, tied_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastlora import from_pretrained, inject, load_adapter, save_adapter

safetensors_torch = pytest.importorskip("safetensors.torch")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS: dict[str, Any] = {"target_modules": ["query", "value"], "r": 4, "bias": "all", "modules_to_save": ["classifier"]}
PREFIX = "base_model.model."
DENSE = PREFIX + "classifier.dense."
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


def renamed(folder: Path) -> None:
    tensors(lambda t: t.update({"more": t.pop(Q0 + ".lora_A.weight")}))(folder)


def dense_bias(bias: Tensor) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({DENSE + "bias": bias}))


def lora_A(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({Q0 + ".lora_A.weight": change(t[Q0 + ".lora_A.weight"])}))


def unsupported(option: str, value: Any) -> tuple[Callable[[Path], Any], type[Exception], str]:
    return config(**{option: value}), ValueError, re.escape(f"{option}={value!r} is not supported, expected ")


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "truncated": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), ValueError, "not a whole safetensors"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), ValueError, "not a whole safetensors"),
    "longer": (lambda f: (f / WEIGHTS).open("ab").write(b"x"), ValueError, "not a whole safetensors"),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({})), ValueError, "not a whole safetensors"),
    "only a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), FileNotFoundError, "a pickle, is never read"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), ValueError, "not a JSON file"),
    "half a config": (lambda f: os.truncate(f / CONFIG, 40), ValueError, "not a JSON file"),
    "nested too deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), ValueError, "not a JSON file"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "must hold a JSON object, got list"),
    "missing bias": (tensors(lambda t: t.pop(Q0 + ".base_layer.bias")), ValueError, rf"lacks 1 keys.*{Q0}\.base_layer\.bias"),
    "missing module": (tensors(lambda t: t.pop(DENSE + "weight")), ValueError, rf"lacks 1 .*{DENSE}weight"),
    "missing and more": (
        renamed,
        ValueError,
        rf"lacks 1 keys .*'{Q0}\.lora_A\.weight', and has 1 keys .* 'more'",
    ),
    "another copy": (tensors(lambda t: t.update({PREFIX + "pooler.original_module.bias": torch.ones(1)})), ValueError, "has 1"),
    "shape": (lora_A(lambda A: A[:, 1:]), ValueError, r"shape \(4, 15\), expected \(4, 16\)"),
    "shape of a bias": (dense_bias(torch.ones(17)), ValueError, r"\(17,\), expected \(16,\)"),
    "rank": (of_a_wider_model, ValueError, r"lora_B\.weight' has shape \(32, 4\), expected \(16, 4\)"),
    "precision": (
        dense_bias(torch.ones(16).double()),
        ValueError,
        rf"{DENSE}bias' is torch\.float64, which torch",
    ),
    "integers": (lora_A(Tensor.int), ValueError, r"is torch\.int32, which torch\.float32 cannot"),
    "corda": unsupported("init_lora_weights", "corda"),
    "pissa": unsupported("init_lora_weights", "pissa_niter_2"),
    "olora": unsupported("init_lora_weights", "olora"),
    "bdlora": unsupported("use_bdlora", {"nblocks": 2}),
    "kasa": unsupported("kasa_config", {"beta": 0.1}),
    "unknown variant": unsupported("use_next_years_lora", True),
    "another method": unsupported("peft_type", "IA3"),
    "trainable tokens": unsupported("trainable_token_indices", [1]),
    "tied modules to save": unsupported("ensure_weight_tying", True),
    "bad pattern": (config(alpha_pattern={"(q": 3}), ValueError, r"'\(q' is not a regular expression"),
    "pattern of another type": (config(rank_pattern=["q"]), ValueError, "rank_pattern must be a dict"),
    "pattern of names": (config(rank_pattern={"q": "2"}), ValueError, "rank_pattern.'q'. must be an int"),
    "rank of another type": (config(r="4"), ValueError, "r must be an int, got str '4'"),
    "alpha of another type": (config(lora_alpha=True), ValueError, "lora_alpha must be a float, got bool True"),
    "modules of another type": (config(modules_to_save={"a": 1}), ValueError, "modules_to_save must be .*, got {'a': 1}"),
    "modules without names": (config(modules_to_save=[1]), ValueError, r"modules_to_save must be .*strings, got \[1\]"),
}

# Files that contradict how a model was injected, with the error of from_pretrained where it finds one.
OTHERS: dict[str, tuple[Callable[[Path], Any], str, str | None]] = {
    "rank": (config(r=5), "r=5, but the layer .* has r=4", r"r=5 for 'roberta\..*', but the largest rank in .* is 4"),
    "absurd rank": (config(r=10**13), "r=10000000000000, but the layer", r"r=10000000000000 for .* largest rank in .* is 4"),
    "default rank": (config(r=None), "r=8, but the layer .* has r=4", "r=8 for .*, but the largest rank in .* is 4"),
    "bias": (config(bias="lora_only"), "bias='lora_only', but the model was injected with bias='all'", "has 13 keys that"),
    "no modules": (config(modules_to_save=None), r"modules_to_save=\[\], but .*differ in classifier", "has 2 keys that"),
    "modules": (config(modules_to_save=["pooler", "embeddings"]), "modules_to_save=.* they differ in ", "lacks"),
    "another model": (of_another_model, "bias='none', but the model was injected with bias='all'", "matches no module of"),
    "scaling": (config(lora_alpha=13), "lora_alpha=13, but", None),
    "rslora": (config(use_rslora=True), "use_rslora=True, but", None),
    "dora": (config(use_dora=True), "use_dora=True, but", r"lacks \d+ keys .*lora_magnitude_vector"),
    "alpha pattern": (config(alpha_pattern={".*1.*": 3}), "lora_alpha=3, but the layer .*1", None),
    "rank pattern": (config(rank_pattern={"query": 2}), "r=2, but the layer .*query' has r=4", r"expected \(2, 16\)"),
}


def state(model: nn.Module) -> list[Any]:
    """All that a failed call must leave as it was."""
    tensors = [(name, id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()]
    return [tensors, dict(model.named_modules()), [m.training for m in model.modules()], vars(model).get("lora_options")]


CASES = [(tamper, error, message, message) for tamper, error, message in BROKEN.values()]
CASES += [(tamper, ValueError, message, message_anew) for tamper, message, message_anew in OTHERS.values()]


@pytest.mark.parametrize(("tamper", "error", "message", "message_anew"), CASES, ids=[*BROKEN, *(f"other {o}" for o in OTHERS)])
@pytest.mark.filterwarnings("ignore")
def test_a_broken_file_changes_nothing(
    tamper: Callable[[Path], Any], error: type[Exception], message: str, message_anew: str | None, folder: Path
) -> None:
    model, plain = inject(roberta(), **OPTIONS), roberta().train()
    plain.roberta.pooler = None
    before, plain_before = state(model), state(plain)
    tamper(folder)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert state(model) == before
    if message_anew is not None:
        with pytest.raises(error, match=message_anew):
            from_pretrained(plain, folder)
        assert state(plain) == plain_before


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
    for function in (load_adapter, save_adapter):
        with pytest.raises(ValueError, match=r"half loaded: .*query\.lora_A\.weight' are on the meta device"):
            function(empty, folder)
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


def test_a_pattern_that_peft_reordered_is_told(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it saves: where two match a layer, its file no longer says what was trained."""
    options: dict[str, Any] = {"target_modules": ["query"], "r": 4, "alpha_pattern": {"query": 3, ".*0.*": 5}}
    peft.get_peft_model(roberta(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_alpha=5, but the layer '.*0\..*query' has lora_alpha=3"):
        load_adapter(inject(roberta(), **options), tmp_path)
    model = inject(roberta(), **options)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
