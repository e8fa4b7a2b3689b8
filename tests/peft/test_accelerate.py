"""accelerate and decelerate: which layers they take, what they report, and that only the class of a layer changes."""

import copy
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
from peft_layer import forward_of_its_own, hook
from peft_models import accelerated, build, counted_calls, equal, inputs_of, logits_of, run, wrap
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.peft import layers

pytestmark = pytest.mark.filterwarnings("ignore:fastlora. ")  # of layers that are left


def test_only_the_class_changes_and_it_changes_back() -> None:
    model = wrap(build())
    eager = copy.deepcopy(model)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    text = repr(model)
    assert len(fastlora.accelerate(model).taken) == 14
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == list(eager.state_dict())
    assert repr(model) == text.replace("lora.Linear(", "lora.FusedLinear(")
    assert all(isinstance(layer, Linear) for layer in layers.find(model).values())
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
    first = fastlora.accelerate(model)
    headline, backend = str(first).splitlines()
    assert headline == "fastlora: 2 of 2 LoRA layers accelerated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastlora.accelerate(model)
    assert str(again).splitlines() == [headline, "  already accelerated: 2", backend]
    assert again.taken == again.already == first.taken
    assert fastlora.peft.status(model) == first


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OtherLinear(Linear):
    """Somebody else's LoRA layer."""


def altered(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    linear = nn.Linear(4, 4)
    change(linear)
    return lambda: linear


NOT_PEFTS = "it is a {}, not peft's lora.Linear"
HOOKED = "its base layer has hooks, or a forward of its own"
BASES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear": (lambda: nn.Linear(4, 4), None),
    "conv1d": (lambda: Conv1D(4, 4), None),
    "subclass": (lambda: Doubling(4, 4), f"its base layer is a {__name__}.Doubling"),
    "hooked": (altered(hook), HOOKED),
    "own forward": (altered(forward_of_its_own), HOOKED),
    "parametrised": (
        altered(parametrizations.weight_norm),
        "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "its base weight is on the meta device: load it first"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", BASES)
def test_layers_that_are_left_are_reported_with_their_reason(kind: str) -> None:
    make, reason = BASES[kind]
    model = peft.get_peft_model(
        nn.ModuleDict({"it": make(), "plain": nn.Linear(4, 4)}), peft.LoraConfig(target_modules=["it", "plain"])
    )
    classes = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match=f"1 of 2 LoRA layers accelerated\n  left, {reason}") if reason else nullcontext():
        report = fastlora.accelerate(model)
    names = "base_model.model.it", "base_model.model.plain"
    assert (report.taken, report.left) == ((names, ()) if reason is None else (names[1:], ((names[0], reason),)))
    fastlora.decelerate(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "__class__", OtherLinear), NOT_PEFTS.format(f"{__name__}.OtherLinear")),
        (lambda layer: setattr(layer, "forward", lambda x: x), "its forward is replaced on the instance"),
    ],
    ids=["subclass", "own forward"],
)
def test_layers_that_are_not_as_peft_made_them_are_left(change: Callable[[nn.Module], None], reason: str) -> None:
    model = wrap(build(), target_modules=["q_proj"])
    for layer in layers.find(model).values():
        change(layer)
    assert {told for _, told in fastlora.accelerate(model).left} == {reason}


def test_layers_of_other_modules_and_methods_are_left() -> None:
    attention = peft.get_peft_model(nn.ModuleDict({"it": nn.MultiheadAttention(4, 2)}), peft.LoraConfig(target_modules=["it"]))
    report = fastlora.accelerate(attention)  # its projection is read, not called
    assert (len(report.taken), len(report.left)) == (0, 2)
    adalora = peft.get_peft_model(build(), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1))
    assert {told for _, told in fastlora.accelerate(adalora).left} == {NOT_PEFTS.format("peft.tuners.adalora.layer.SVDLinear")}


def test_report_groups_by_reason() -> None:
    left = *((name, "because") for name in "cdefg"), ("h", "so")
    backends = ("cpu", "torch"), ("cuda", "triton")
    assert repr(fastlora.peft.Report(("a",), (("b", "why"),), left, backends=backends)).splitlines() == [
        "fastlora: 1 of 8 LoRA layers accelerated",
        "  waiting, why: 1 (b)",
        "  left, because: 5 (c, d, e and 2 more)",
        "  left, so: 1 (h)",
        "  backend on cpu: torch, which saves memory rather than time on this device",
        "  backend on cuda: triton",
    ]


def test_the_backends_are_those_of_the_layers_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(build(), target_modules=["q_proj"])
    assert fastlora.peft.status(model).backends == ()
    assert fastlora.accelerate(model).backends == (("cpu", layers.available_backends("cpu")[0]),)
    monkeypatch.setattr(layers, "available_backends", lambda device: ("triton", device.type))
    assert fastlora.peft.status(model).backends == (("cpu", "triton"),)


FUNCTIONS = [fastlora.accelerate, fastlora.decelerate, fastlora.peft.status, fastlora.peft.fallbacks]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_models_without_lora_layers_are_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, holds no LoRA layer of PEFT's: call peft\.get_peft_model"):
        function(build())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        function("llama")
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        function(peft.get_peft_model(build(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])))


@pytest.mark.parametrize("function", [*FUNCTIONS, fastlora.peft.register])
def test_an_unsupported_peft_is_named_and_the_model_unchanged(
    function: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(build(), target_modules=["q_proj"])
    text = repr(model)
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"needs a newer peft, got 0\.17\.1: pip install 'peft>=0\.18'"):
        function(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft, which is missing: pip install 'peft>=0\.18'"):
        function(model)
    assert repr(model) == text


def test_importing_fastlora_imports_no_optional_package() -> None:
    unwanted = "{'peft', 'transformers', 'packaging', 'bitsandbytes'}"
    code = f"""if True:
        import sys, torch, fastlora.peft, fastlora.quantized
        assert not fastlora.quantized.is_quantized(torch.nn.Linear(2, 2))
        assert not {unwanted} & set(sys.modules)
        fastlora.accelerate"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_accelerated_model_are_accelerated(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = accelerated(target_modules=["q_proj"], lora_dropout=0.1)
    other = duplicate(model)
    assert len(fastlora.peft.status(other).taken) == 2
    assert equal(run(model, inputs_of()), run(other, inputs_of()))
    fastlora.decelerate(other)
    assert len(fastlora.peft.status(model).taken) == 2
