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
from peft_layer import hook
from peft_models import FLOOR, PRECISIONS, Judged, build, equal, inputs_of, logits_of, run, wrap
from saved import saved_by
from torch import Tensor, nn

import fastlora
from fastlora import dropout_mask, oracle
from fastlora.dropout import draw_seed, keep_scale
from fastlora.peft import layers
from fastlora.peft.gated import activation_of, shape_of
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


class Masked(nn.Module):
    """The dropout of one linear of a gated MLP, with the mask that `lora_mlp` takes: gate's draws the seed of all three."""

    def __init__(self, p: float, index: int, seeds: list[Tensor]) -> None:
        super().__init__()
        self.p, self.index, self.seeds = p, index, seeds

    def forward(self, x: Tensor) -> Tensor:
        if self.index == 0:
            self.seeds[:] = [draw_seed(x.device)]
        mask = dropout_mask(self.seeds[0], x[..., 0].numel(), x.shape[-1], self.p, projection=self.index)
        return x * mask.view(x.shape) * keep_scale(self.p)


class JudgedMlp(Judged):
    """`Judged` for a model whose MLPs alone have adapters, with one seed for the three masks of each."""

    def __init__(self, model: nn.Module, names: list[str], autocast_dtype: torch.dtype | None) -> None:
        super().__init__(model, autocast_dtype)
        self.eager = copy.deepcopy(model)
        for module in find(model):
            seeds: list[Tensor] = []
            for index, name in enumerate(names):
                dropout = self.eager.get_submodule(f"{module}.{name}").lora_dropout
                dropout["default"] = Masked(dropout["default"].p, index, seeds)
        self.truth = copy.deepcopy(self.eager).double()
        fastlora.decelerate(self.fused)
        assert fastlora.accelerate(self.fused, groups=False, mlp=True).mlps


@pytest.mark.parametrize("precision", ["float32", "mixed-autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_every_gradient(kind: str, precision: str) -> None:
    names = ["wi_0", "wi_1", "wo"] if kind == "t5" else LINEARS
    dtype, autocast_dtype = PRECISIONS[precision]
    judge = JudgedMlp(wrap(build(kind, dtype), target_modules=names, lora_dropout=0.3), names, autocast_dtype)
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
    "two adapters": lambda mlp: (
        mlp.up_proj.update_layer("other", 2, lora_alpha=1, lora_dropout=0.0, init_lora_weights=True, use_rslora=False)
        if False
        else mlp.up_proj.set_adapter([])
    ),
    "another activation": lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
    "a linear of another kind": lambda mlp: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_own_forward_runs_where_the_step_would_differ(change: str) -> None:
    model = attached()
    eager = copy.deepcopy(model)
    fastlora.decelerate(eager)
    for own, other in ((mlp_of(model), find(eager)),):
        CHANGES[change](own)
        CHANGES[change](next(iter(other.values())))
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
    """The figures of docs/mlp.md, for each row: of PEFT, of single layers, and of one step."""
    hidden, inner, rows = 128, 448, 64  # 2 : 7, as in Llama 3 8B
    options = {"hidden_size": hidden, "intermediate_size": inner}
    with mock.patch.dict("peft_models.CAUSAL", options):
        config = {**__import__("peft_models").CAUSAL}
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    model = wrap(base, target_modules=LINEARS, lora_dropout=0.1, r=4)
    mlp = next(iter(find(model).values()))
    parameters = {p.data_ptr() for p in model.parameters()}
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, requires_grad=True)

    def kept() -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_by(lambda: mlp(x))}
        return sum(size for address, size in storages.items() if address not in parameters and address != x.data_ptr())

    peft = kept()
    fastlora.accelerate(model, groups=False)
    single = kept()
    fastlora.accelerate(model, groups=False, mlp=True)
    step = kept()
    small = rows * (3 * 4 * 4 + (2 * hidden + inner) // 8)  # S, and a bit an element and mask
    assert step == 2 * rows * inner * 2 + small
    assert (peft // rows, single // rows, step // rows) == (0, 0, 0)
