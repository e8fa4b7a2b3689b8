"""Call by call: what the fused path cannot take goes to PEFT's forward, bit for bit, is counted, and is said once."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft_models import MaskedDropout, build, counted_calls, logits_of, wrap
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

import fastlora
from fastlora import oracle
from fastlora.peft import calls, fallbacks, layers


def layer_of(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One accelerated layer with a random adapter, in training mode."""
    torch.manual_seed(0)
    model = wrap(nn.ModuleList([base or nn.Linear(8, 12)]).to(dtype), target_modules=["0"], **options)
    fastlora.accelerate(model)
    return model.base_model.model[0]


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def forward_of_its_own(module: nn.Module) -> None:
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


def set_dtypes(A: torch.dtype, B: torch.dtype) -> Callable[[Any], Any]:
    return lambda layer: [half.to(dtype) for half, dtype in ((layer.lora_A, A), (layer.lora_B, B))]


def add_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(12))


def replace_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = MaskedDropout(0.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on the base": (lambda layer: hook(layer.base_layer), "its base layer has hooks, or a forward of its own"),
    "forward of the base": (
        lambda layer: forward_of_its_own(layer.base_layer),
        "its base layer has hooks, or a forward of its own",
    ),
    "hook on A": (lambda layer: hook(layer.lora_A["default"]), "the adapter's modules have hooks, or a forward of their own"),
    "forward of B": (
        lambda layer: forward_of_its_own(layer.lora_B["default"]),
        "the adapter's modules have hooks, or a forward of their own",
    ),
    "hook on dropout": (
        lambda layer: hook(layer.lora_dropout["default"]),
        "the adapter's modules have hooks, or a forward of their own",
    ),
    "parametrised A": (
        lambda layer: parametrizations.weight_norm(layer.lora_A["default"]),
        "lora_A and lora_B are ParametrizedLinear and Linear instead of plain linears",
    ),
    "parametrised base": (
        lambda layer: parametrizations.weight_norm(layer.base_layer),
        "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "dropout of another kind": (replace_dropout, "its dropout is a MaskedDropout"),
    "bias of B": (add_bias, "the adapter has a bias (lora_bias)"),
    "trainable base": (lambda layer: layer.base_layer.weight.requires_grad_(), "its base weight is trainable"),
    "16-bit adapter": (
        set_dtypes(torch.bfloat16, torch.bfloat16),
        "x is torch.float32, the base weight torch.float32, the adapter torch.bfloat16 (autocast: None)",
    ),
    "64-bit adapter": (
        set_dtypes(torch.float64, torch.float64),
        "x is torch.float32, the base weight torch.float32, the adapter torch.float64 (autocast: None)",
    ),
    "no casting": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), calls.UNCAST),
}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_afterwards_is_pefts(change: str) -> None:
    layer = layer_of()
    alter, reason = CHANGES[change]
    alter(layer)
    expected = copy.deepcopy(layer)
    layers.restore(expected)
    with counted_calls() as made:
        torch.manual_seed(7)
        result = layer(x_of())
    torch.manual_seed(7)
    assert torch.equal(result, expected(x_of()))
    assert not made
    assert dict(layer._fastlora_tally.fallbacks) == {reason: 1}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_every_kind_run(kind: str, part: str) -> None:
    layer = layer_of()
    ran: list[str] = []
    handle = getattr(layer.get_submodule(part), f"register_{kind}")(lambda *args: ran.append(kind))
    with counted_calls() as made:
        layer(x_of()).sum().backward()
    assert ran == [kind]
    assert not made
    handle.remove()
    with counted_calls() as made:
        layer(x_of())
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
def test_adapter_of_two_dtypes_fails_as_in_peft() -> None:
    layer = layer_of()
    set_dtypes(torch.float32, torch.float64)(layer)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x_of())


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize("who", ["peft", "fastlora"])
@pytest.mark.parametrize(
    "x", [torch.ones(5, 8, dtype=torch.float64), torch.ones(5, 8, dtype=torch.int64)], ids=["wide", "integers"]
)
def test_inputs_that_peft_refuses_are_refused_by_peft(x: Tensor, who: str) -> None:
    layer = layer_of()
    if who == "peft":
        layers.restore(layer)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


TAKEN: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]] = {  # x, base, adapter, autocast
    "float64": (torch.float64, torch.float64, torch.float64, None),
    "float16": (torch.float16, torch.float16, torch.float16, None),
    "float16, wide adapter": (torch.float16, torch.float16, torch.float32, None),
    "all but x": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "to another half": (torch.float16, torch.float16, torch.float32, torch.bfloat16),
    "narrow adapter": (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
    "autocast leaves float64": (torch.float64, torch.float64, torch.float64, torch.bfloat16),
}


@pytest.mark.parametrize("combination", TAKEN)
def test_dtypes_that_are_fused_come_out_as_pefts(combination: str) -> None:
    x_dtype, base, adapter, autocast = TAKEN[combination]
    layer = layer_of(dtype=base)
    set_dtypes(adapter, adapter)(layer)
    expected = copy.deepcopy(layer)
    layers.restore(expected)
    with counted_calls() as made, torch.autocast("cpu", autocast, enabled=autocast is not None):
        results = layer(x_of(x_dtype)), expected(x_of(x_dtype))
    assert len(made) == 1
    assert results[0].dtype == results[1].dtype
    leaves = [layer.lora_A["default"].weight, expected.lora_A["default"].weight]
    grads = [torch.autograd.grad(result.sum(), leaf)[0] for result, leaf in zip(results, leaves, strict=True)]
    assert grads[0].dtype == grads[1].dtype == adapter


def test_autocast_that_leaves_the_adapter_behind_is_pefts() -> None:
    layer = layer_of(dtype=torch.float64)
    layer.lora_A.float(), layer.lora_B.float()
    with counted_calls() as made, torch.autocast("cpu", torch.bfloat16):
        assert layer.eval()(x_of(torch.float64)).dtype == torch.float64
    assert not made
    assert "autocast: torch.bfloat16" in next(iter(layer._fastlora_tally.fallbacks))


def test_functorch_transforms_are_pefts() -> None:
    layer = layer_of().eval()
    x = x_of().detach()
    expected = copy.deepcopy(layer)
    layers.restore(expected)
    for transform in (torch.func.vmap, lambda f: torch.func.jacrev(f)):
        assert torch.equal(transform(layer)(x), transform(expected)(x))
    assert set(layer._fastlora_tally.fallbacks) == {"a functorch transform (torch.func) is active"}


def test_forward_mode_and_tracing_are_pefts() -> None:
    layer = layer_of().eval()
    x = x_of().detach()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert oracle.relative_error(tangent, layer(x + 1) - layer(x)) <= 4 * oracle.FLOOR[x.dtype, x.dtype]
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert traced(x[:2]).shape == (2, 12)
    assert dict(layer._fastlora_tally.fallbacks) == {"forward-mode differentiation is active": 1, "torch.jit is tracing": 1}


@pytest.mark.filterwarnings("ignore:fastlora")
@pytest.mark.parametrize("own_forward", [False, True])
def test_hooks_of_accelerate_that_only_move_x_are_harmless(own_forward: bool) -> None:
    """As a device_map puts them on every module of a model over several devices."""
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    base = nn.Sequential(nn.Linear(8, 12))
    if own_forward:
        forward_of_its_own(base[0])
    big_modeling.dispatch_model(base, {"": "cpu"}, force_hooks=True, main_device="cpu")
    assert hasattr(base[0], "_hf_hook")
    model = wrap(base, target_modules=["0"])
    fastlora.accelerate(model)
    with counted_calls() as made:
        model(x_of())
    assert len(made) == (not own_forward)


@pytest.mark.parametrize("x", [torch.ones(5, 8).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])])
def test_tensors_that_are_not_dense_are_pefts(x: Tensor) -> None:
    layer = layer_of().eval()
    with counted_calls() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested and sparse tensors prototypes
        with contextlib.suppress(RuntimeError, NotImplementedError):  # what torch makes of them is PEFT's affair
            layer(x)
    assert not made
    assert set(layer._fastlora_tally.fallbacks) == {"x is a Tensor that is not dense"}


@pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")
@pytest.mark.parametrize(
    ("rows", "grad", "device", "expected"),
    [
        ((64,), False, "meta", True),
        ((4, 16), False, "meta", True),
        ((65,), False, "meta", False),
        ((64,), True, "meta", False),
        ((64,), False, "cpu", False),
    ],
)
def test_decoding_on_an_accelerator_is_pefts(rows: tuple[int, ...], grad: bool, device: str, expected: bool) -> None:
    """The meta device stands for one that is not a CPU."""
    layer = layer_of().to(device)
    with torch.set_grad_enabled(grad):
        decision = calls.decide(layer, torch.empty(*rows, 8, device=device), (), {})
    assert (decision == calls.DECODING) == expected
    assert isinstance(decision, str) == expected


def test_more_arguments_than_x_are_pefts() -> None:
    layer = layer_of()
    with counted_calls() as made, pytest.raises(TypeError):
        layer(x_of(), 3)
    assert not made
    assert layer(x=x_of(), adapter_names=None, alora_offsets=None).shape == (5, 12)  # nothing more than x
    assert dict(layer._fastlora_tally.fallbacks) == {"the layer is called with more than x": 1}


def test_hooks_on_the_layer_itself_run_around_the_fused_call() -> None:
    layer = layer_of().eval()
    expected = layer(x_of())
    hook(layer)
    with counted_calls() as made:
        assert torch.equal(layer(x_of()), 2 * expected)
    assert len(made) == 1


def test_one_warning_for_each_reason_and_model() -> None:
    model = wrap(build(), target_modules=["q_proj", "v_proj"])
    fastlora.accelerate(model)
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3))
    model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits_of(model)
        logits_of(model)
    said = [str(warning.message) for warning in caught if "trains through PEFT's own forward" in str(warning.message)]
    assert len(said) == 1
    assert "several adapters are active" in said[0]
    counted = fallbacks(model)
    assert counted.keys() == {"several adapters are active"}
    assert set(counted["several adapters are active"].values()) == {2}
    assert len(counted["several adapters are active"]) == 4
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model)
        logits_of(other)
    assert set(fallbacks(model)["several adapters are active"].values()) == {3}
    model.add_adapter("third", peft.LoraConfig(target_modules=["up_proj"]))
    fastlora.accelerate(model)  # takes two new layers, of the same model
    model.base_model.set_adapter(["default", "second", "third", "third"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model)
    assert len(fallbacks(model)["several adapters are active"]) == 6


@pytest.mark.filterwarnings("error:an accelerated LoRA layer")
def test_no_warning_for_what_was_asked_for_or_in_evaluation() -> None:
    model = wrap(build(), target_modules=["q_proj"])
    fastlora.accelerate(model)
    with model.disable_adapter():
        logits_of(model)
    model.merge_adapter()
    logits_of(model)
    model.unmerge_adapter()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    with torch.no_grad():
        logits_of(model)
    logits_of(model.eval())
    assert fallbacks(model).keys() == {calls.DISABLED, calls.MERGED, "its base weight is trainable"}
    with pytest.raises(UserWarning, match="its base weight is trainable"):
        logits_of(model.train())


def test_counts_begin_anew_with_each_acceleration() -> None:
    layer = layer_of()
    model = nn.ModuleList([layer])
    layer.merge()
    layer(x_of())
    assert fallbacks(model) == {calls.MERGED: {"0": 1}}
    fastlora.decelerate(model)
    assert type(layer) is Linear
    fastlora.accelerate(model)
    assert fallbacks(model) == {}
