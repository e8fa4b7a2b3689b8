"""DoRA without PEFT: the operators and the Function against float64, and the layers that `inject` makes of it."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planned import DTYPES
from saved import saved_by
from torch import Tensor, nn

from fastlora import FusedLoraLinear, dropout_mask, inject, merge_and_unload, oracle, reference
from fastlora.oracle import Case, Inputs
from fastlora.variants import dora_ops
from fastlora.variants.dora import dora_linear

OUTPUTS = (*oracle.OUTPUTS, "dmagnitude")
SHAPE = (40, 56, 264)  # every output has the elements that one draw needs


def magnitude_of(inputs: Inputs, scaling: float = 1.5) -> Tensor:
    """A trained magnitude: 0.6 to 1.4 times the norm, so that what it scales shows."""
    dtype = torch.promote_types(inputs.weight.dtype, torch.float32)
    n = dora_ops.norm(*(t.to(dtype) for t in (inputs.weight, inputs.lora_A, inputs.lora_B)), scaling)
    return (n * torch.linspace(0.6, 1.4, len(n))).to(inputs.lora_A.dtype)


def results(function: Callable[..., Tensor], case: Case, inputs: Inputs, magnitude: Tensor) -> dict[str, Tensor]:
    leaves = inputs.map(Tensor.detach)
    needed = [leaves.x, leaves.lora_A, leaves.lora_B, leaves.bias, magnitude.detach().clone()]
    needed = [tensor.requires_grad_() for tensor in needed if tensor is not None]
    options = {"magnitude": needed[-1], "scaling": case.scaling, "dropout_p": case.dropout_p, "seed": inputs.seed}
    y = function(leaves.x, *leaves.weights, **options)
    names = OUTPUTS if case.bias else (*OUTPUTS[:4], OUTPUTS[-1])
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, needed, inputs.dy)), strict=True))


def eager(x: Tensor, *weights: Any, seed: int, dropout_p: float, **options: Any) -> Tensor:
    mask = dropout_mask(seed, x.shape[0], x.shape[1], dropout_p) if dropout_p else None
    return reference.dora_linear(x, *weights, dropout_p=dropout_p, keep_mask=mask, **options)


def failures(case: Case, function: Callable[..., Tensor]) -> list[str]:
    """The outputs of `function` that the oracle does not pass."""
    inputs = oracle.draw(case)
    magnitude = magnitude_of(inputs)
    found, own = (results(each, case, inputs, magnitude) for each in (function, eager))
    exact = results(eager, case, inputs.double(), magnitude.double())
    rows = {
        name: oracle.judge(case, "dA" if name == "dmagnitude" else name, found[name], own[name], ref)
        for name, ref in exact.items()
    }
    return [f"{name}: {row.error:.2e}, bound {row.bound:.2e} {row.note}" for name, row in rows.items() if not row.passed]


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_against_float64(backend, dropout_p, dtype, adapter_dtype):
    case = Case(SHAPE, 8, dtype, adapter_dtype, dropout_p=dropout_p)
    assert not failures(case, partial(dora_linear, backend=backend))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 17), (0, 4, 6)], ids=str)
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_float64_and_odd_shapes(shape, dropout_p, bias):
    assert not failures(Case(shape, 3, torch.float64, bias=bias, dropout_p=dropout_p), dora_linear)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "planted",
    [{"scaling": 1.4}, {"seed": 1, "dropout_p": 0.3}, {"magnitude": torch.full((SHAPE[2],), 0.9)}],
    ids=str,
)
def test_planted_errors_are_seen(planted, dropout_p):
    def wrong(*tensors, magnitude, **options):
        given = {"magnitude": magnitude, **options} | planted
        return dora_linear(*tensors, **given) + 0 * magnitude

    found = {line.partition(":")[0] for line in failures(Case(SHAPE, 8, dropout_p=dropout_p), wrong)}
    assert found >= set(OUTPUTS) - {"dbias"}


def test_the_norm_is_a_constant_and_never_forms_the_product():
    inputs = oracle.draw(Case((2, 300, 200), 4, torch.bfloat16, torch.float32))
    with_product = inputs.weight.double() + 1.5 * inputs.lora_B.double() @ inputs.lora_A.double()
    n = dora_ops.norm(inputs.weight, inputs.lora_A, inputs.lora_B, 1.5)
    assert n.dtype == torch.float32
    assert oracle.relative_error(n, with_product.norm(dim=1)) < oracle.FLOOR[torch.float32, torch.float32]


def test_the_norm_sees_a_weight_that_changes_without_a_trace():
    """`.data` in place, as PEFT merges, changes neither the version nor the address of a Parameter."""
    layer = FusedLoraLinear(16, 24, 2, bias=False, use_dora=True)
    x = torch.randn(3, 16)
    before = layer(x)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(layer(x), before)  # the rows keep their length


def test_what_is_saved():
    """x, S, the adapter, vectors, the mask's bits; z alone is of y's size, and only where the magnitude is trained."""
    layer = FusedLoraLinear(256, 320, 4, lora_dropout=0.1, use_dora=True, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)

    def sizes(p: float) -> dict[tuple[int, ...], int]:
        layer.lora_dropout = p
        return {tuple(t.shape): t.element_size() for t in saved_by(lambda: layer(x)) if t.numel() > 320 * 4}

    bits = {(128, 32): 1}
    held = {(128, 256): 2, (320, 256): 2}
    assert sizes(0.0) == held | {(128, 320): 2}
    assert sizes(0.1) == held | bits | {(128, 320): 4}
    layer.lora_magnitude_vector.requires_grad_(False)
    assert sizes(0.0) == held
    assert sizes(0.1) == held | bits


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias", "magnitude"])
@pytest.mark.parametrize("backend", ["addmm", "torch"])
def test_one_gradient_alone_is_that_of_all(backend, wanted, dropout_p):
    inputs = oracle.draw(Case((9, 24, 40), 4))
    named = {name: getattr(inputs, name) for name in ("x", "weight", "lora_A", "lora_B", "bias")}
    named["magnitude"] = magnitude_of(inputs)

    def gradient(needed: set[str]) -> Tensor:
        given = {name: tensor.detach().clone().requires_grad_(name in needed) for name, tensor in named.items()}
        y = dora_linear(**given, dropout_p=dropout_p, seed=3, backend=backend)
        return torch.autograd.grad(y, given[wanted], inputs.dy)[0]

    assert torch.equal(gradient({wanted}), gradient(set(named) - {"weight"}))


def test_second_derivatives_are_refused():
    layer = FusedLoraLinear(8, 8, 2, use_dora=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(torch.randn(2, 8)).sum(), layer.lora_A, create_graph=True)


@pytest.mark.parametrize("seeded", [True, False])
def test_opcheck(seeded):
    drawn = oracle.draw(Case((9, 24, 40), 4))
    x, (weight, A, B, bias), factor = drawn.x, drawn.weights, torch.rand(40)
    seed, p = (torch.tensor([5]), 0.25) if seeded else (None, 0.0)
    operands = (x, weight, A, B, bias, factor, seed, 0.5, p, "torch")
    _, S, mask, z = dora_ops.DORA_LINEAR(*operands, True)
    torch.library.opcheck(dora_ops.DORA_NORM, (weight, A, B, 0.5))  # raises
    torch.library.opcheck(dora_ops.DORA_LINEAR, (*operands, seeded))
    saved = (x, weight, A, B, factor, S, mask, z) if seeded else (None, None, None, None, factor, None, None, z)
    torch.library.opcheck(dora_ops.DORA_LINEAR_BACKWARD, (drawn.dy, *saved, 0.5, p, torch.float32, "torch"))


def test_compiled():
    layer = FusedLoraLinear(24, 40, 4, lora_dropout=0.2, use_dora=True)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    def grads(module: nn.Module, rows: int) -> list[Tensor]:
        torch.manual_seed(rows)
        x = torch.randn(rows, 24, requires_grad=True)
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]

    for rows in (5, 7):
        torch.testing.assert_close(grads(compiled, rows), grads(layer, rows))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"magnitude": torch.ones(5)}, ValueError, r"magnitude must be \(out,\) = \(6,\) on cpu, got \(5,\)"),
    "dimensions": ({"magnitude": torch.ones(6, 1)}, ValueError, "magnitude"),
    "type": ({"magnitude": None}, TypeError, "magnitude must be a"),
    "integers": ({"magnitude": torch.ones(6, dtype=torch.int64)}, TypeError, "magnitude must be float32"),
    "rank": ({"lora_A": torch.ones(0, 4), "lora_B": torch.ones(6, 0)}, ValueError, "r=0, expected r >= 1"),
    "seed": ({"seed": 0.5}, TypeError, "seed must be"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    change, error, message = BAD[bad]
    given = {"x": torch.ones(2, 4), "weight": torch.ones(6, 4), "lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}
    with pytest.raises(error, match=message):
        dora_linear(**given | {"magnitude": torch.ones(6)} | change)
    with pytest.raises(ValueError, match="use_dora=True needs r >= 1, got r=0"):
        FusedLoraLinear(4, 6, r=0, use_dora=True)


@torch.no_grad()
def trained(layer: FusedLoraLinear) -> FusedLoraLinear:
    nn.init.normal_(layer.lora_B, std=0.3)
    layer.lora_magnitude_vector.mul_(torch.linspace(-0.6, 1.4, layer.out_features))
    return layer


@pytest.mark.filterwarnings("ignore:a merged LoRA linear")
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_layer_starts_as_its_linear_and_merges(fan_in_fan_out):
    layer = FusedLoraLinear(12, 20, 4, use_dora=True, fan_in_fan_out=fan_in_fan_out, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.to_linear(merged=False)(x))
    expected, layout = trained(layer)(x), layer.weight.stride()
    torch.testing.assert_close(layer.to_linear(merged=True)(x), expected)
    assert layer.merged_weight().stride() == layout
    base = layer.weight
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@pytest.mark.filterwarnings("ignore:a merged LoRA linear")
@pytest.mark.parametrize("keep_base", [True, False])
def test_the_state_of_a_merged_layer_is_the_same_function(keep_base):
    layer, other = (FusedLoraLinear(12, 20, 4, use_dora=True) for _ in range(2))
    x = torch.randn(5, 12)
    expected = trained(layer)(x)
    layer.merge(keep_base)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected)
    into = copy.deepcopy(other)
    into.merge(keep_base=False)
    into.load_state_dict(layer.state_dict())
    torch.testing.assert_close(into(x), expected)
    partial_state = {name: t for name, t in layer.state_dict().items() if name != "lora_magnitude_vector"}
    with pytest.raises(RuntimeError, match="lora_magnitude_vector"):
        into.load_state_dict(partial_state)


def test_inject_trains_the_magnitude_and_merges():
    model = inject(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6)), target_modules=["0", "1"], r=4, use_dora=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{at}.{name}" for at in (0, 1) for name in ("lora_A", "lora_B", "lora_magnitude_vector")}
    for layer in model:
        trained(layer)
    x = torch.randn(5, 12)
    expected = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), expected)
    assert type(model[0]) is nn.Linear


def test_the_eager_layer_draws_the_same_mask():
    options: dict[str, Any] = {"target_modules": ["0"], "r": 4, "lora_dropout": 0.3, "use_dora": True}
    eager, fused = (
        inject(nn.Sequential(nn.Linear(12, 20)), layer=kind, **options) for kind in (reference.EagerLoraLinear, FusedLoraLinear)
    )
    fused.load_state_dict(eager.state_dict())
    trained(fused[0])
    eager.load_state_dict(fused.state_dict())
    x, found = torch.randn(5, 12), []
    for model in (eager, fused):
        torch.manual_seed(3)
        found.append(model(x))
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], fused.eval()(x))


def test_four_bits():
    pytest.importorskip("bitsandbytes")
    model = inject(nn.Sequential(nn.Linear(64, 32)), target_modules=["0"], r=4, use_dora=True, quantize="nf4")
    x, layer = torch.randn(5, 64), model[0]
    torch.testing.assert_close(layer(x), layer.to_linear(merged=False)(x))
    expected = trained(layer)(x)
    torch.testing.assert_close(merge_and_unload(model)(x), expected)


def test_copies_and_other_devices():
    with torch.device("meta"):
        meta = inject(
            nn.Sequential(nn.Linear(16, 8)).bfloat16(), target_modules=["0"], use_dora=True, adapter_dtype=torch.float32
        )
    assert meta[0].lora_magnitude_vector.is_meta
    layer, x = trained(FusedLoraLinear(16, 8, 2, use_dora=True)), torch.randn(3, 16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.inference_mode():
        expected = layer(x)
        assert FusedLoraLinear(16, 8, 2, use_dora=True)(x).isfinite().all()  # its weight has no version
    assert torch.equal(layer(x), expected)
