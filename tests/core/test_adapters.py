"""Adapter files: PEFT reads ours, we read PEFT's, and nothing half-written or ill-fitting gets through."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import oracle
from fastlora.adapters import load_adapter, save_adapter
from fastlora.finetune.eager import EagerLoraLinear
from fastlora.injection.inject import inject
from fastlora.modules import FusedLoraLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def injected(layer: type[FusedLoraLinear] = FusedLoraLinear, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """An injected model with random adapters: a B of zeros would hide any mistake."""
    options = {"target_modules": TARGETS, "r": 4, "lora_alpha": 12, **options}
    model = inject(llama(dtype), layer=layer, **options)
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def assert_same_function(fused: Tensor, by_peft: Tensor, folder: Path) -> None:
    """The oracle's rule, with PEFT in float64 for the truth and PEFT in the same dtype for eager."""
    truth = logits(peft.PeftModel.from_pretrained(llama(torch.float64), folder, autocast_adapter_dtype=False).double())
    floor = oracle.FLOOR[by_peft.dtype, by_peft.dtype]
    bound = max(floor, oracle.EAGER_FACTOR * oracle.relative_error(by_peft, truth))
    assert oracle.relative_error(fused, truth) <= bound
    assert oracle.relative_error(logits(llama()), truth) > 100 * bound  # the adapters matter


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=str)
def test_peft_loads_what_we_save(tmp_path: Path, options: dict[str, Any]) -> None:
    save_adapter(injected(**options), tmp_path)
    by_peft = logits(peft.PeftModel.from_pretrained(llama(), tmp_path))
    assert torch.equal(logits(injected(EagerLoraLinear, **options)), by_peft)  # the very operations of PEFT
    assert_same_function(logits(injected(**options)), by_peft, tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_what_peft_saves(tmp_path: Path, use_rslora: bool) -> None:
    config = peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=12, lora_dropout=0.3, use_rslora=use_rslora)
    wrapped = peft.get_peft_model(llama(), config)
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    options = {"target_modules": TARGETS, "r": 4, "lora_alpha": 12, "use_rslora": use_rslora}
    eager, fused = inject(llama(), layer=EagerLoraLinear, **options), inject(llama(), **options)
    for model in (eager, fused):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(eager), logits(wrapped))
    assert_same_function(logits(fused), logits(wrapped), tmp_path)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal", "mica"])
def test_we_load_what_peft_initialised_on_the_same_base(tmp_path: Path, init: bool | str) -> None:
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=12, init_lora_weights=init))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = inject(llama(), layer=EagerLoraLinear, target_modules=TARGETS, r=4, lora_alpha=12)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(wrapped))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_refuses_what_peft_trained_on_a_changed_base(tmp_path: Path, init: str) -> None:
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=12, init_lora_weights=init))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' is not supported"):
        load_adapter(inject(llama(), target_modules=TARGETS, r=4, lora_alpha=12), tmp_path)


def test_file_holds_pefts_keys_in_the_training_dtype(tmp_path: Path) -> None:
    save_adapter(injected(dtype=torch.bfloat16, adapter_dtype=torch.float32), tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if ".0." in key} == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (torch.float32, (4, 32)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (torch.float32, (32, 4)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": (torch.float32, (4, 48)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (torch.float32, (32, 4)),
    }
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_round_trip_is_exact_and_widens(tmp_path: Path) -> None:
    model = injected(dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "new" / "folder")
    other = injected(adapter_dtype=torch.float32)
    load_adapter(other, tmp_path / "new" / "folder")
    saved = adapter_tensors(model)
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in adapter_tensors(other).items())


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    save_adapter(injected(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(injected(r=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(folder: Path, *, without: str = "", **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    config.pop(without, None)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors_torch.load(path.read_bytes())
    change(tensors)
    safetensors_torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def with_q0(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q0: change(tensors[Q0])}))


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing key": (lambda f: edit_tensors(f, lambda t: t.pop(Q0)), ValueError, f"lacks 1 keys.*{Q0}"),
    "unexpected key": (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), ValueError, "has 1 keys.*'extra'"),
    "shape": (with_q0(lambda q: q[:, 1:]), ValueError, r"shape \(4, 31\), expected \(4, 32\)"),
    "wider dtype": (with_q0(Tensor.double), ValueError, "float64, which torch.float32 cannot"),
    "integers": (with_q0(Tensor.int), ValueError, "torch.int32"),
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 700), ValueError, "not a whole safetensors file"),
    "no tensors": (lambda f: os.remove(f / "adapter_model.safetensors"), FileNotFoundError, "adapter_model.safetensors"),
    "no config": (lambda f: os.remove(f / "adapter_config.json"), FileNotFoundError, "adapter_config.json"),
    "half a config": (lambda f: os.truncate(f / "adapter_config.json", 40), ValueError, "not a JSON file"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "must hold a JSON object, got list"),
    "rank": (lambda f: edit_config(f, r=8), ValueError, "r=8, but the layer .* has r=4"),
    "default rank": (lambda f: edit_config(f, without="r"), ValueError, "r=8, but the layer .* has r=4"),
    "scaling": (lambda f: edit_config(f, lora_alpha=13), ValueError, "lora_alpha=13, but"),
    "rslora": (lambda f: edit_config(f, use_rslora=True), ValueError, "use_rslora=True, but"),
    "dora": (lambda f: edit_config(f, use_dora=True), ValueError, "use_dora=True is not supported"),
    "corda": (lambda f: edit_config(f, init_lora_weights="corda"), ValueError, "init_lora_weights='corda' is not supported"),
    "bdlora": (lambda f: edit_config(f, use_bdlora={"nblocks": 2}), ValueError, "use_bdlora={'nblocks': 2} is not supported"),
    "kasa": (lambda f: edit_config(f, kasa_config={"beta": 0.1}), ValueError, "kasa_config={'beta': 0.1} is not supported"),
    "monteclora": (lambda f: edit_config(f, monteclora_config={"a": 1}), ValueError, "monteclora_config=.* is not supported"),
    "unknown variant": (lambda f: edit_config(f, use_next_years_lora=True), ValueError, "use_next_years_lora=True is not"),
    "bias": (lambda f: edit_config(f, bias="all"), ValueError, "bias='all', but the model .* bias='none'"),
    "rank pattern": (lambda f: edit_config(f, rank_pattern={"q_proj": 2}), ValueError, "r=2, but the layer .*q_proj' has r=4"),
    "alpha pattern": (lambda f: edit_config(f, alpha_pattern={".*1.*": 3}), ValueError, "lora_alpha=3, but the layer .*1"),
    "bad pattern": (lambda f: edit_config(f, alpha_pattern={"(q": 3}), ValueError, r"'\(q' is not a regular expression"),
    "pattern of another type": (lambda f: edit_config(f, rank_pattern=["q"]), ValueError, "rank_pattern must be a dict"),
    "pattern of names": (lambda f: edit_config(f, rank_pattern={"q": "2"}), ValueError, "rank_pattern.'q'. must be an int"),
    "rank of another type": (lambda f: edit_config(f, r="4"), ValueError, "r must be an int, got str '4'"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), ValueError, "peft_type='IA3' is not supported"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path, tampering: str) -> None:
    tamper, error, message = TAMPERINGS[tampering]
    save_adapter(injected(), tmp_path)
    tamper(tmp_path)
    model = inject(llama(), target_modules=TARGETS, r=4, lora_alpha=12)
    before = adapter_tensors(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


LAST = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("keep_base", "remedy"), [(True, r"unmerge\(\) it first"), (False, "dropped the base weight")])
def test_loading_into_a_merged_layer_is_refused(tmp_path: Path, keep_base: bool, remedy: str) -> None:
    save_adapter(injected(), tmp_path)
    model = inject(llama(), target_modules=TARGETS, r=4, lora_alpha=12)
    model.get_submodule(LAST).merge(keep_base)
    before = adapter_tensors(model)
    with pytest.raises(RuntimeError, match=f"'{LAST}' is merged.*{remedy}"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())
    if keep_base:
        model.get_submodule(LAST).unmerge()
        load_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(injected()))


def test_saving_a_merged_layer_needs_its_base_weight(tmp_path: Path) -> None:
    model = injected()
    save_adapter(model, tmp_path / "unmerged")
    model.get_submodule(LAST).merge()
    save_adapter(model, tmp_path / "merged")
    for name in os.listdir(tmp_path / "unmerged"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()
    model.get_submodule(LAST).unmerge()
    model.get_submodule(LAST).merge(keep_base=False)
    with pytest.raises(RuntimeError, match=f"'{LAST}' is merged.*dropped the base weight"):
        save_adapter(model, tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()


def test_model_without_adapters_or_with_unequal_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no LoRA linear"):
        save_adapter(llama(), tmp_path / "a")
    with pytest.raises(ValueError, match="holds no LoRA linear"):
        load_adapter(llama(), tmp_path)
    mixed = nn.ModuleList([FusedLoraLinear(4, 4, r=1), FusedLoraLinear(4, 4, r=1, lora_dropout=0.5)])
    with pytest.raises(ValueError, match=r"differ in lora_dropout: \[0.0, 0.5\]"):
        save_adapter(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()
