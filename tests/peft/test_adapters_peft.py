"""Adapter files and PEFT, both ways, with biases, modules to save, patterns, Conv1D and tied weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import CASES, IDS, gpt2, llama, logits, our_name, randomise, roberta, tied_llama
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear, from_pretrained, inject, load_adapter, oracle, save_adapter
from fastlora.reference import EagerLoraLinear

safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's warnings, and ours on tied weights, have tests of their own


def wrapped(case: str) -> nn.Module:
    build, options = CASES[case]
    return randomise(peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **options)))


def injected(case: str) -> nn.Module:
    build, options = CASES[case]
    return inject(build(), r=4, lora_alpha=6, lora_dropout=0.1, **options)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {our_name(name): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def assert_same_function(case: str, model: nn.Module, by_peft: nn.Module, folder: Path) -> None:
    """The oracle's rule, with PEFT in float64 for the truth and PEFT in the same dtype for eager."""
    build, _ = CASES[case]
    result, eager, base = logits(model), logits(by_peft), logits(build())
    exact = peft.PeftModel.from_pretrained(build().double(), folder, autocast_adapter_dtype=False).double()
    truth = logits(exact)
    bound = max(oracle.FLOOR[torch.float32, torch.float32], oracle.EAGER_FACTOR * oracle.relative_error(eager, truth))
    assert oracle.relative_error(result, truth) <= bound
    assert oracle.relative_error(base, truth) > 100 * bound  # the adapter matters


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(case: str, tmp_path: Path) -> None:
    model = randomise(injected(case))
    save_adapter(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).fan_in_fan_out == (CASES[case][0] is gpt2)
    by_peft = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path, is_trainable=True)
    # PEFT may train less than it loads: a target's bias in a file with modules to save, say; what we trained is there.
    theirs = {our_name(n): p for n, p in by_peft.named_parameters() if ".original_module." not in n}
    assert_equal(trained(model), {name: theirs[name] for name in trained(model)})
    assert trained(by_peft).keys() == trained(model).keys()
    assert_same_function(case, model, by_peft, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
    by_peft = wrapped(case)
    by_peft.save_pretrained(tmp_path)
    model = injected(case)
    load_adapter(model, tmp_path)
    made = from_pretrained(CASES[case][0](), tmp_path, is_trainable=True)
    for each in (model, made):
        assert_equal(trained(each), trained(by_peft))
        assert {m.lora_dropout for m in each.modules() if isinstance(m, FusedLoraLinear)} == {0.1}
    assert_same_function(case, model, by_peft, tmp_path)
    save_adapter(made, tmp_path / "ours")
    again = from_pretrained(CASES[case][0](), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not any(module.training for module in again.modules())


def test_peft_finds_the_class_and_the_place_of_the_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(inject(base, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert oracle.relative_error(logits(loaded), logits(model)) <= oracle.FLOOR[torch.float32, torch.float32]


def test_a_pefts_task_type_brings_modules_to_save_of_which_the_model_has_some(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4)
    by_peft = randomise(peft.get_peft_model(roberta(), config))
    by_peft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    model = from_pretrained(roberta(), tmp_path, is_trainable=True)
    assert_equal(trained(model), trained(by_peft))
    load_adapter(inject(roberta(), target_modules=["query"], r=4, modules_to_save=["classifier"]), tmp_path)


def test_the_embeddings_that_peft_adds_to_the_file_are_loaded_and_saved_again(tmp_path: Path) -> None:
    base = tied_llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    by_peft = randomise(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4)))
    by_peft.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.base_layer.weight" in keys
    model = from_pretrained(tied_llama(), tmp_path)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_adapter(model, tmp_path / "again")
    assert safetensors_torch.load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == keys


class Normed(nn.Module):
    """A module to save with buffers, one of them an integer; and names of which one ends as another does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block["proj"](self.proj(x)))


def test_buffers_of_a_module_to_save_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(8, 4)
    fresh = Normed()
    fresh.load_state_dict(model.state_dict())
    reference = Normed()
    reference.load_state_dict(model.state_dict())
    randomise(inject(model, target_modules="all-linear", r=2, modules_to_save=["norm"]))
    model(x)
    save_adapter(model, tmp_path)
    model.eval()
    from_pretrained(fresh, tmp_path)
    assert fresh.norm.num_batches_tracked == 1
    assert torch.equal(fresh(x), model(x))
    by_peft = peft.PeftModel.from_pretrained(reference, tmp_path)
    truth = by_peft(x).detach()
    assert oracle.relative_error(model(x).detach(), truth) <= oracle.FLOOR[torch.float32, torch.float32]


def test_a_name_that_ends_another_is_told_apart_in_the_config(tmp_path: Path) -> None:
    model = randomise(inject(Normed(), target_modules=r"proj", r=2))
    save_adapter(model, tmp_path)
    by_peft = peft.PeftModel.from_pretrained(Normed(), tmp_path)
    assert [n for n, m in by_peft.named_modules() if isinstance(m, peft.tuners.lora.Linear)] == ["base_model.model.proj"]
    assert isinstance(from_pretrained(Normed(), tmp_path).block["proj"], nn.Linear)


def accelerated(model: nn.Module, **options: Any) -> nn.Module:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    fastlora.accelerate(wrapped)
    return wrapped


@pytest.mark.parametrize("adapt", [inject, accelerated])
def test_lora_plus_trains_b_faster(adapt: Callable[..., nn.Module]) -> None:
    model = adapt(llama(), target_modules=["q_proj"], r=4)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: rates[p] for name, p in named.items()} == {name: 16e-3 if "lora_B" in name else 1e-3 for name in named}
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    assert all(parameter.any() for name, parameter in named.items() if "lora_B" in name)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal", "mica"])
def test_we_load_what_peft_initialised_on_the_same_base(tmp_path: Path, init: bool | str) -> None:
    by_peft = randomise(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)))
    by_peft.save_pretrained(tmp_path)
    model = inject(llama(), layer=EagerLoraLinear, target_modules=["q_proj"], r=4)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(by_peft))  # the very operations of PEFT
