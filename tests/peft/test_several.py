"""Several adapters in one call, all on every row or one for each entry of the batch: PEFT's numbers by the oracle's rule."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from peft_models import PRECISIONS, Judged, accelerated, build, config, inputs_of, logits_of, randomise, wrap
from quantized_models import dense, quantized_llama
from torch import Tensor, nn

import fastlora
from fastlora import dropout_mask, oracle
from fastlora.dropout import draw_seed, keep_scale
from fastlora.peft import fallbacks, layers, mixed_batch
from fastlora.variants import several

NAMES = ["second", "__base__", "default"]


def with_second(model: nn.Module, **options: Any) -> Any:
    """The model with a second adapter of another rank and scaling, on q_proj and down_proj alone, and both active."""
    model.add_adapter("second", config(**{"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5, **options}))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    return model


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The calls of `lora_adapters` that accelerated layers make."""
    with mock.patch("fastlora.peft.fused.lora_adapters", wraps=several.lora_adapters) as made:
        yield made.call_args_list


def failures(judge: Judged, precision: str, names: Sequence[str] | None = None) -> list[str]:
    compute = PRECISIONS[precision][1] or PRECISIONS[precision][0]
    with ExitStack() as stack:
        if names is not None:
            for model in (judge.fused, judge.model):  # copies of a model keep its hooks
                stack.enter_context(mixed_batch(model, names))
        for draw in range(2 if compute == torch.float32 else 6):
            judge.add(inputs_of(seed=draw), seed=draw)
    return judge.failures(oracle.FLOOR[compute, compute])


@pytest.mark.parametrize("names", [None, NAMES], ids=["all active", "mixed batch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_and_every_gradient(precision: str, names: list[str] | None) -> None:
    judge = Judged(with_second(wrap(build(dtype=PRECISIONS[precision][0]))), PRECISIONS[precision][1])
    with counted() as made:
        assert not failures(judge, precision, names)
    assert not fallbacks(judge.fused)
    draws = 2 if precision == "float32" else 6
    assert len(made) == draws * (4 if names is None else len(layers.find(judge.fused)))
    assert sum(".second." in name for name in judge.sums) == 8


@pytest.mark.parametrize("names", [None, NAMES], ids=["all active", "mixed batch"])
def test_quantised(names: list[str] | None) -> None:
    judge = Judged(with_second(wrap(quantized_llama("nf4", torch.float32))), exact=dense)
    assert not failures(judge, "float32", names)
    assert not fallbacks(judge.fused)


class Masked(nn.Module):
    """Dropout of the rows `entries` with mask number `word` of the seed that the accelerated layer draws."""

    def __init__(self, p: float, word: int, seed: int, entries: slice) -> None:
        super().__init__()
        self.p, self.word, self.seed, self.entries = p, word, seed, entries

    def forward(self, x: Tensor) -> Tensor:
        mask = dropout_mask(self.seed, 4 * 7, x.shape[-1], self.p, projection=self.word).view(4, 7, -1)[self.entries]
        return x * mask * keep_scale(self.p)


@pytest.mark.parametrize(("rates", "words"), [((0.3, 0.3), (0, 1)), ((0.5, 0.2), (0, 1)), ((0.0, 0.2), (None, 1))], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_each_adapter_has_its_own_mask(mixed: bool, rates: tuple[float, float], words: tuple[Any, Any]) -> None:
    """In a mixed batch adapters of one rate share a mask: a row meets only one of them."""
    torch.manual_seed(0)
    model = wrap(nn.ModuleList([nn.Linear(64, 48)]), target_modules=["0"], lora_dropout=rates[0])
    with_second(model, target_modules=["0"], lora_dropout=rates[1])
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    own, layer = model.base_model.model[0], fused.base_model.model[0]
    torch.manual_seed(5)
    seed = int(draw_seed("cpu"))
    torch.manual_seed(5)
    names = ["default", "second", "second", "second"] if mixed else None
    for name, p, word, entries in zip(("default", "second"), rates, words, (slice(0, 1), slice(1, 4)), strict=True):
        if p:
            word = 0 if mixed and rates[0] == rates[1] else word
            own.lora_dropout[name] = Masked(p, word, seed, entries if mixed else slice(None))
    x = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    options = {"adapter_names": names} if mixed else {}
    found = []
    for each in (layer, own):
        y = each(x, **options)
        parameters = [p for p in each.parameters() if p.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    assert len(found[0]) == 6
    assert not layer._fastlora_tally.fallbacks
    for result, expected in zip(*found, strict=True):
        assert oracle.relative_error(result, expected) < 2 * oracle.FLOOR[torch.float32, torch.float32]


def test_pefts_own_argument_in_evaluation() -> None:
    model = with_second(wrap(build())).eval()
    fused = copy.deepcopy(model)
    fastlora.accelerate(fused)
    with torch.no_grad(), counted() as made:
        y, expected = (logits_of(each, adapter_names=NAMES) for each in (fused, model))
    assert made
    assert not fallbacks(fused)
    assert oracle.relative_error(y, expected) < 2 * oracle.FLOOR[torch.float32, torch.float32]
    for each in (fused, model):
        with pytest.raises(ValueError, match="training mode"):
            logits_of(each.train(), adapter_names=NAMES)


def test_rows_of_no_adapter_and_adapters_of_no_row() -> None:
    """They get the base's output, and no gradient."""
    model = with_second(accelerated())
    with mixed_batch(model, ["__base__", "second", "second"]):
        logits = logits_of(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(logits[0], logits_of(model)[0])
    logits.square().sum().backward()
    used = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert used == {"second"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_activation_checkpointing(use_reentrant: bool) -> None:
    model = with_second(accelerated())
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with mixed_batch(model, NAMES):
            logits_of(model).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1])


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a string": ("default", TypeError, "adapter_names must be a list of str, one for each entry of the batch, got 'default'"),
    "no list": (3, TypeError, "got 3"),
    "no names": ([], ValueError, "adapter_names is empty"),
    "a number": ([1, "default"], TypeError, "got 1 among them"),
    "unknown": (["third"] * 3, ValueError, "adapter_names holds 'third', expected 'default', 'second' or '__base__'"),
    "length": (["default"] * 2, ValueError, "got 2 and 3"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_names(bad: str) -> None:
    names, error, message = BAD[bad]
    model = with_second(accelerated())
    with pytest.raises(error, match=message), mixed_batch(model, names):
        logits_of(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dora_and_merged_adapters_are_refused_as_in_peft() -> None:
    model = with_second(accelerated(use_dora=True), use_dora=True)
    with mixed_batch(model, NAMES), pytest.raises(ValueError, match="when DoRA is enabled"):
        logits_of(model)
    with pytest.warns(UserWarning, match="several adapters are active, one of them with DoRA"):
        logits_of(model)
    model = with_second(accelerated())
    model.merge_adapter()
    with mixed_batch(model, NAMES), pytest.raises(ValueError, match="merged adapters"):
        logits_of(model)


def test_disabled_adapters_win() -> None:
    model = with_second(accelerated())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with model.disable_adapter(), mixed_batch(model, NAMES):
            mixed = logits_of(model)
        with model.disable_adapter():
            assert torch.equal(mixed, logits_of(model))


@pytest.mark.parametrize("kind", ["DoRA", "all active", "mixed batch"])
def test_traced_in_one_graph(kind: str) -> None:
    options = {"target_modules": ["0"], "lora_dropout": 0.1}
    model = accelerated(nn.ModuleList([nn.Linear(16, 24)]), use_dora=kind == "DoRA", **options)
    if kind != "DoRA":
        with_second(model, **options)
    layer, x = model.base_model.model[0], torch.randn(4, 5, 16, requires_grad=True)
    names = {"adapter_names": ["second", "__base__", "second", "default"]} if kind == "mixed batch" else {}
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    results = []
    for call in (compiled, layer):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(call(x, **names).square().sum(), x)[0])
    torch.testing.assert_close(*results)
    assert not layer._fastlora_tally.fallbacks


@pytest.mark.filterwarnings("ignore:fastlora. ")
@pytest.mark.parametrize("kind", ["plain", "DoRA", "all active"])
def test_a_gated_mlp_with_other_adapters_is_left(kind: str) -> None:
    model = wrap(build(), use_dora=kind == "DoRA").eval()
    if kind == "all active":
        with_second(model)
    fused = copy.deepcopy(model)
    report = fastlora.accelerate(fused, mlp=True)
    assert len(report.mlps_left) == (0 if kind == "plain" else 2)
    assert (
        oracle.relative_error(logits_of(fused).detach(), logits_of(model).detach())
        < 2 * oracle.FLOOR[torch.float32, torch.float32]
    )
    assert not fallbacks(fused)
