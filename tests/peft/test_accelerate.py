"""accelerate and decelerate: what they take, what they tell, and that nothing but the class changes."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_models import build, counted_calls, inputs_of, logits_of, run, wrap
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.peft import layers

pytestmark = pytest.mark.filterwarnings("ignore:fastlora. ")  # of layers that are left


def test_nothing_but_the_class_changes_and_it_changes_back() -> None:
    model = wrap(build())
    eager = copy.deepcopy(model)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    text = repr(model)
    assert len(fastlora.accelerate(model).taken) == 14
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == list(eager.state_dict())
    assert repr(model) == text.replace("lora.Linear(", "lora.FusedLinear(")
    assert fastlora.decelerate(model) == 14
    assert repr(model) == text
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in eager.modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
    with counted_calls() as made:
        assert torch.equal(logits_of(model), logits_of(eager))
    assert not made
    assert fastlora.decelerate(model) == 0


def test_accelerating_twice_says_so_and_changes_nothing() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    assert str(fastlora.accelerate(model)) == "fastlora: 2 of 2 LoRA layers accelerated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastlora.accelerate(model)
    assert again.taken == ()
    assert {reason for _, reason in again.left} == {"already accelerated"}
    assert len(fastlora.peft.status(model).taken) == 2
    assert fastlora.decelerate(model) == 2


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def meta() -> nn.Module:
    return nn.Linear(4, 4, device="meta")


BASES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear": (lambda: nn.Linear(4, 4), None),
    "conv1d": (lambda: Conv1D(4, 4), None),
    "embedding": (lambda: nn.Embedding(4, 4), "it is a peft.tuners.lora.layer.Embedding, not peft's lora.Linear"),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), "it is a peft.tuners.lora.layer.Conv2d, not peft's lora.Linear"),
    "subclass": (Doubling, "its base layer is a test_peft_accelerate.Doubling"),
    "hooked": (hooked, "its base layer has hooks, or a forward of its own"),
    "parametrised": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "meta": (meta, "its base weight is on the meta device: load it first"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", BASES)
def test_layers_that_are_left_are_told_with_their_reason(kind: str) -> None:
    make, reason = BASES[kind]
    args = (4, 4) if make is Doubling else ()
    model = peft.get_peft_model(
        nn.ModuleDict({"it": make(*args), "plain": nn.Linear(4, 4)}), peft.LoraConfig(target_modules=["it", "plain"])
    )
    classes = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match=f"1 of 2 LoRA layers accelerated\n  left, {reason}") if reason else nullcontext():
        report = fastlora.accelerate(model)
    name = "base_model.model.it"
    assert report.taken == ((name, "base_model.model.plain") if reason is None else ("base_model.model.plain",))
    assert report.left == (() if reason is None else ((name, reason),))
    fastlora.decelerate(model)
    assert [type(m) for m in model.modules()] == classes


def test_attention_module_reads_its_projection_without_calling_it() -> None:
    model = peft.get_peft_model(nn.ModuleDict({"it": nn.MultiheadAttention(4, 2)}), peft.LoraConfig(target_modules=["it"]))
    report = fastlora.accelerate(model)
    assert not report.taken
    assert len(report.left) == 2


def test_layers_with_a_forward_of_their_own_are_left() -> None:
    model = wrap(nn.ModuleDict({"it": nn.Linear(4, 4)}), target_modules=["it"])
    layer = model.base_model.model["it"]
    layer.forward = lambda x: x
    assert fastlora.accelerate(model).left == (("base_model.model.it", "its forward is replaced on the instance"),)


class OtherLinear(Linear):
    """Somebody else's LoRA layer."""


def test_subclasses_of_pefts_layer_are_left() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    for layer in layers.find(model).values():
        layer.__class__ = OtherLinear
    assert {reason for _, reason in fastlora.accelerate(model).left} == {
        f"it is a {__name__}.OtherLinear, not peft's lora.Linear"
    }


def test_report_groups_by_reason() -> None:
    text = repr(fastlora.peft.Report(("a",), (("b", "why"),), (*((name, "because") for name in "cdefg"), ("h", "so"))))
    assert text.splitlines() == [
        "fastlora: 1 of 8 LoRA layers accelerated",
        "  waiting, why: 1 (b)",
        "  left, because: 5 (c, d, e and 2 more)",
        "  left, so: 1 (h)",
    ]


FUNCTIONS = [fastlora.accelerate, fastlora.decelerate, fastlora.peft.status, fastlora.peft.fallbacks]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_models_without_lora_layers_are_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, holds no LoRA layer of PEFT's: call peft\.get_peft_model"):
        function(build())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module with PEFT's LoRA layers, got str"):
        function("llama")
    other_method = peft.get_peft_model(build(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        function(other_method)


def test_layers_of_adalora_are_left() -> None:
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1)
    report = fastlora.accelerate(peft.get_peft_model(build(), config))
    assert [reason for _, reason in report.left] == ["it is a peft.tuners.adalora.layer.SVDLinear, not peft's lora.Linear"] * 2


@pytest.mark.parametrize("function", [*FUNCTIONS, fastlora.peft.register])
def test_an_unsupported_peft_is_named_and_the_model_unchanged(
    function: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(build(), target_modules=["q_proj"])
    text = repr(model)
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"needs peft >= 0\.18, but peft 0\.17\.1 is installed"):
        function(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "fastlora\[hf\]"'):
        function(model)
    assert repr(model) == text


def test_importing_fastlora_imports_neither_peft_nor_transformers() -> None:
    code = "import sys, fastlora.peft; assert not {'peft', 'transformers', 'packaging'} & set(sys.modules); fastlora.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_accelerated_model_are_accelerated(how: str) -> None:
    model = wrap(build(), target_modules=["q_proj"], lora_dropout=0.1)
    fastlora.accelerate(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert len(fastlora.peft.status(other).taken) == 2
    results = [run(m, inputs_of()) for m in (model, other)]
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    fastlora.decelerate(other)
    assert len(fastlora.peft.status(model).taken) == 2


def test_a_shallow_copy_of_a_layer_decides_for_itself() -> None:
    layer = next(iter(layers.find(wrap(build())).values()))
    layers.fuse(layer, set())
    other = copy.copy(layer)
    layers.restore(other)
    assert layers.is_fused(layer)
    with counted_calls() as made:
        layer(torch.randn(2, 32))
        other(torch.randn(2, 32))
    assert len(made) == 1


def test_linear_is_still_pefts() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    fastlora.accelerate(model)
    assert all(isinstance(layer, Linear) for layer in layers.find(model).values())
