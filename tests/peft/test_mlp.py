"""Gated MLPs of PEFT models as one step: which are recognised, that PEFT's numbers come out, and when the own forward runs."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft_layer import hook
from peft_models import CAUSAL, FLOOR, PRECISIONS, Judged, build, curve, equal, inputs_of, logits_of, run, wrap
from saved import saved_by
from torch import nn

import fastlora
from fastlora import oracle
from fastlora.peft.gated import Shape, activation_of, shape_of
from fastlora.peft.mlp import GatedMlp, find

pytestmark = pytest.mark.filterwarnings("ignore:r=4 is above min", "ignore:fastlora. ")

LINEARS = ["gate_proj", "up_proj", "down_proj"]
MODELS = {"llama": 2, "qwen2": 2, "gemma": 2, "mistral": 2, "t5": 4}


@contextmanager
def counted_steps() -> Iterator[list[Any]]:
    """The calls of `lora_mlp` that attached modules make."""
    with mock.patch("fastlora.peft.mlp.lora_mlp", wraps=fastlora.lora_mlp) as made:
        yield made.call_args_list


def attached(model: nn.Module | None = None, **options: Any) -> nn.Module:
    wrapped = wrap(model or build(), **options)
    fastlora.accelerate(wrapped, groups=False, mlp=True)
    return wrapped


class JudgedMlp(Judged):
    """`Judged` with gated MLPs as one step, each with one seed for the masks of gate, up and down."""

    def __init__(self, model: nn.Module, names: list[str], autocast_dtype: torch.dtype | None) -> None:
        super().__init__(model, autocast_dtype)
        self.mlps = fastlora.accelerate(self.fused, mlp=True).mlps
        self.names = names

    def groups(self) -> list[list[str]]:
        return [*super().groups(), *([f"{mlp}.{name}" for name in self.names] for mlp in self.mlps)]


@pytest.mark.parametrize("precision", ["float32", "mixed-autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_every_gradient(kind: str, precision: str) -> None:
    """Adapters on all linears: layers that share x are groups beside the MLPs."""
    dtype, autocast_dtype = PRECISIONS[precision]
    names = ["wi_0", "wi_1", "wo"] if kind == "t5" else LINEARS
    judge = JudgedMlp(wrap(build(kind, dtype), lora_dropout=0.3), names, autocast_dtype)
    draws = 2 if precision == "float32" else 6
    with counted_steps() as calls:
        for draw in range(draws):
            judge.add(inputs_of(kind, seed=draw), seed=draw)
    compute = autocast_dtype or dtype
    assert not judge.failures(oracle.FLOOR[compute, compute])
    assert len(calls) == draws * MODELS[kind]
    assert fastlora.peft.fallbacks(judge.fused) == {}


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj"], ["q_proj", "up_proj"]])
def test_some_linears_without_adapters(targets: list[str]) -> None:
    model = wrap(build(), target_modules=targets)
    expected = run(model, inputs_of())
    fastlora.accelerate(model, mlp=True)
    with counted_steps() as calls:
        found = run(model, inputs_of())
    assert len(calls) == 2
    assert all(oracle.relative_error(found[name], expected[name]) <= 2 * FLOOR for name in expected)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_curve_is_pefts(kind: str) -> None:
    eager = wrap(build(kind))
    model = copy.deepcopy(eager)
    fastlora.accelerate(model, mlp=True)
    with counted_steps() as calls:
        expected, losses = curve(eager, kind, 10), curve(model, kind, 10)
    assert losses[-1] < 0.9 * losses[0]
    assert oracle.relative_error(losses, expected) <= 2 * FLOOR
    assert len(calls) == 10 * MODELS[kind]


def test_the_report_and_the_way_back() -> None:
    model = wrap(build())
    kinds, text = [type(m) for m in model.modules()], repr(model)
    report = fastlora.accelerate(model, groups=False, mlp=True)
    assert "  2 gated MLPs computed as one step" in str(report).splitlines()
    assert report.mlps == tuple(f"base_model.model.model.layers.{i}.mlp" for i in range(2))
    assert report.mlps_left == ()
    assert fastlora.peft.status(model).mlps == report.mlps
    assert "FusedLlamaMLP(" in repr(model)
    assert fastlora.accelerate(model, groups=False, mlp=True).mlps == report.mlps
    fastlora.decelerate(model)
    assert ([type(m) for m in model.modules()], repr(model)) == (kinds, text)
    with pytest.raises(TypeError, match="mlp must be a bool, got int 1"):
        fastlora.accelerate(model, mlp=1)
    assert repr(model) == text


def test_accelerating_draws_no_random_numbers_and_counts_no_fallback() -> None:
    model = wrap(build(), lora_dropout=0.1)
    fastlora.accelerate(model, groups=False)
    state, training = torch.get_rng_state(), [m.training for m in model.modules()]
    with mock.patch("fastlora.torch_backend.BREAK_EVEN", 1 << 30):
        fastlora.accelerate(model, groups=False, mlp=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert fastlora.peft.fallbacks(model) == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_attached(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = attached(lora_dropout=0.1)
    other = duplicate(model)
    assert fastlora.peft.status(other).mlps == fastlora.peft.status(model).mlps
    with counted_steps() as calls:
        assert equal(run(model, inputs_of()), run(other, inputs_of()))
    assert len(calls) == 4


def mlp_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, GatedMlp))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on a linear": lambda mlp: hook(mlp.up_proj),
    "hook on the activation": lambda mlp: hook(mlp.act_fn),
    "merged": lambda mlp: mlp.down_proj.merge(),
    "disabled": lambda mlp: mlp.gate_proj.enable_adapters(False),
    "trainable base": lambda mlp: mlp.gate_proj.base_layer.weight.requires_grad_(),
    "no active adapter": lambda mlp: mlp.up_proj.set_adapter([]),
    "another activation": lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
    "a linear of another kind": lambda mlp: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_own_forward_runs_where_the_step_would_differ(change: str) -> None:
    model = attached()
    eager = copy.deepcopy(model)
    fastlora.decelerate(eager)
    for mlp in (mlp_of(model), next(iter(find(eager).values()))):
        CHANGES[change](mlp)
    with counted_steps() as calls:
        found = logits_of(model)
    assert len(calls) == 1  # the other layer's
    assert oracle.relative_error(found, logits_of(eager)) <= 2 * FLOOR


def test_small_calls_on_a_cpu_run_the_own_forward() -> None:
    model = attached()
    with mock.patch("fastlora.torch_backend.BREAK_EVEN", 1 << 30), counted_steps() as calls:
        logits_of(model)
    assert not calls


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    model = attached(lora_dropout=0.2)
    mlp = mlp_of(model)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(2, 5, 32), []
    for call in (mlp, compiled):
        torch.manual_seed(1)
        y = call(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), mlp.gate_proj.lora_A["default"].weight)))
    assert all(oracle.relative_error(b, a) <= FLOOR for a, b in zip(*results, strict=True))


def test_checkpointed_layers_recompute_the_same() -> None:
    model = attached(lora_dropout=0.2)
    expected = run(model, inputs_of())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert equal(run(model, inputs_of()), expected)


def test_bytes_saved_by_a_llama_mlp() -> None:
    """The figures of docs/mlp.md: bytes for each row of x, beside x itself, of PEFT, of single layers, and of one step."""
    hidden, inner, rows, r = 128, 448, 64, 4
    config = transformers.LlamaConfig(**CAUSAL | {"hidden_size": hidden, "intermediate_size": inner})
    model = wrap(transformers.LlamaForCausalLM(config).to(torch.bfloat16), target_modules=LINEARS, lora_dropout=0.1, r=r)
    mlp = next(iter(find(model).values()))
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
    kept = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}

    def saved() -> float:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_by(lambda: mlp(x))}
        return sum(size for address, size in storages.items() if address not in kept) / rows

    peft = saved()
    fastlora.accelerate(model, groups=False)
    single = saved()
    fastlora.accelerate(model, groups=False, mlp=True)
    S, bits = 3 * 4 * r, (2 * hidden + inner) // 8
    assert saved() == 4 * inner + S + bits
    assert single == 8 * inner + S + bits
    assert peft == 14 * inner + 16 * hidden + S


class Forwards:
    """Forwards of gated MLPs, and of others."""

    def plain(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def swapped(self, hidden):
        """Up stands first."""
        up = self.c.b(hidden)
        return self.d(up * self.act(self.a(hidden)))

    def product_first(self, x):
        h = self.a(x) * self.b(x)
        return self.d(self.act(h))

    def scaled(self, x):
        return self.d(self.act(self.a(x)) * self.b(x)) * self.scale

    def branching(self, x):
        if self.training:
            x = x + 1
        return self.d(self.act(self.a(x)) * self.b(x))

    def of_another_x(self, x):
        z = self.norm(x)
        return self.d(self.act(self.a(x)) * self.b(z))


def test_forwards_are_recognised_by_their_source() -> None:
    assert shape_of(Forwards.plain) == Shape("F.silu", "self.w1", "self.w3", "self.w2", ())
    assert shape_of(Forwards.swapped) == Shape("self.act", "self.a", "self.c.b", "self.d", ())
    for name in ("product_first", "scaled", "branching", "of_another_x"):
        assert shape_of(getattr(Forwards, name)) is None, name
    assert shape_of(torch.relu) is None


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_pytorch_tanh"),
        ("gelu_fast", "gelu_pytorch_tanh"),
        ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        ("relu", None),
        ("quick_gelu", None),
        ("gelu_10", None),
    ],
)
def test_activations_of_transformers(activation: str, name: str | None) -> None:
    assert activation_of(transformers.activations.ACT2FN[activation]) == name
    assert activation_of(F.silu) == "silu"


def test_what_is_left_is_reported_with_its_reason() -> None:
    model = wrap(build(), target_modules=LINEARS)
    first, second = find(model).values()
    first.act_fn = nn.ReLU()
    second.act_fn.forward = torch.tanh
    report = fastlora.accelerate(model, mlp=True)
    assert (report.mlps, [reason for _, reason in report.mlps_left]) == (
        (),
        ["its activation is torch.nn.modules.activation.ReLU", "its activation has hooks, or a forward of its own"],
    )
    assert "  gated MLP left, its activation is torch.nn.modules.activation.ReLU: 1" in str(report)


def test_a_module_whose_probe_disagrees_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(build(), target_modules=LINEARS)
    monkeypatch.setattr("fastlora.peft.gated.ACTIVATIONS", {"transformers.activations.SiLUActivation": "gelu"})
    report = fastlora.accelerate(model, mlp=True)
    assert report.mlps == ()
    assert {reason.split(":")[0] for _, reason in report.mlps_left} == {"its forward computes something else"}
