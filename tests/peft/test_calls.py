"""Which inputs and surroundings of a call are fused, with PEFT's dtypes, and which run PEFT's forward and are counted."""

import contextlib
import warnings
from typing import Any

import pytest
import torch
from peft_layer import fallbacks_of, layer_of, pefts, set_dtypes, x_of
from peft_models import accelerated, assert_close, counted_calls
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlora import oracle, torch_backend
from fastlora.peft import calls, layers

pytestmark = pytest.mark.filterwarnings("ignore:an accelerated LoRA layer")


REFUSED = [(torch.float64, torch.float32), (torch.int64, torch.float32), (torch.float32, torch.float64)]  # of x, of B


@pytest.mark.parametrize(("x", "B"), REFUSED)
def test_dtypes_that_peft_refuses_are_refused_by_peft(x: torch.dtype, B: torch.dtype) -> None:
    layer = layer_of()
    set_dtypes(torch.float32, B)(layer)
    for each in (layer, pefts(layer)):
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.ones(5, 8, dtype=x))


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
    both = layer, pefts(layer)
    with counted_calls() as made, torch.autocast("cpu", autocast, enabled=autocast is not None):
        results = [each(x_of(x_dtype)) for each in both]
    assert len(made) == 1
    assert results[0].dtype == results[1].dtype
    grads = [torch.autograd.grad(y.sum(), each.lora_A["default"].weight)[0] for y, each in zip(results, both, strict=True)]
    assert grads[0].dtype == grads[1].dtype == adapter


def test_autocast_that_leaves_the_adapter_behind_is_pefts() -> None:
    layer = layer_of(dtype=torch.float64)
    set_dtypes(torch.float32, torch.float32)(layer)
    with counted_calls() as made, torch.autocast("cpu", torch.bfloat16):
        assert layer.eval()(x_of(torch.float64)).dtype == torch.float64
    assert not made
    assert "autocast: torch.bfloat16" in next(iter(fallbacks_of(layer)))


def test_functorch_transforms_are_pefts() -> None:
    layer = layer_of().eval()
    x = x_of().detach()
    for transform in (torch.func.vmap, torch.func.jacrev):
        assert torch.equal(transform(layer)(x), transform(pefts(layer))(x))
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    torch.func.grad(lambda these: torch.func.functional_call(layer, these, (x,)).sum())(parameters)
    assert set(fallbacks_of(layer)) == {"a functorch transform (torch.func) is active"}


def test_forward_mode_and_tracing_are_pefts() -> None:
    layer = layer_of().eval()
    x = x_of().detach()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert oracle.relative_error(tangent, layer(x + 1) - layer(x)) <= 4 * oracle.FLOOR[x.dtype, x.dtype]
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert traced(x[:2]).shape == (2, 12)
    assert fallbacks_of(layer) == {"forward-mode differentiation is active": 1, "torch.jit is tracing": 1}


def test_torch_fx_is_refused_with_the_way_out() -> None:
    model = accelerated(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"]).eval()
    inner = model.base_model.model
    x = x_of().detach()
    for module in (inner, inner[0]):
        with pytest.raises(RuntimeError, match=r"fx cannot trace a LoRA layer.*decelerate.*merge_and_unload.*torch\.export"):
            torch.fx.symbolic_trace(module)
    expected = model(x)
    assert_close({"y": torch.export.export(inner, (x,)).module()(x)}, {"y": expected})
    assert_close({"y": torch.fx.symbolic_trace(model.merge_and_unload())(x)}, {"y": expected})


def test_second_derivatives_are_refused_until_decelerated() -> None:
    layer = layer_of()
    with pytest.raises(RuntimeError, match=r"no second derivative.*decelerate"):
        torch.autograd.grad(layer(x_of()).sum(), layer.lora_A["default"].weight, create_graph=True)
    torch.autograd.grad(pefts(layer)(x_of()).sum(), layer.lora_A["default"].weight, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("x", [torch.ones(5, 8).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])])
def test_tensors_that_are_not_dense_are_pefts(x: Tensor) -> None:
    layer = layer_of().eval()
    with counted_calls() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested and sparse tensors prototypes
        with contextlib.suppress(RuntimeError, NotImplementedError):  # from PEFT's own operations
            layer(x)
    assert not made
    assert set(fallbacks_of(layer)) == {"x is a Tensor that is not dense"}


@pytest.mark.parametrize("shape", [(64, 8), (4, 16, 8), (65, 8)])
@pytest.mark.parametrize(("grad", "device"), [(False, "meta"), (True, "meta"), (False, "cpu")])
def test_decoding_on_an_accelerator_is_pefts(shape: tuple[int, ...], grad: bool, device: str) -> None:
    """The meta device stands for one that is not a CPU."""
    layer = layer_of().to(device)
    with torch.set_grad_enabled(grad):
        decision = calls.decide(layer, torch.empty(shape, device=device), (), {})
    assert (decision == calls.DECODING) == isinstance(decision, str) == (device == "meta" and not grad and shape != (65, 8))


@pytest.mark.parametrize(("rows", "device"), [(4, "cpu"), (5, "cpu"), (4, "meta")])
def test_small_calls_on_a_cpu_are_pefts_without_a_warning(monkeypatch: Any, rows: int, device: str) -> None:
    layer = layer_of().to(device)
    monkeypatch.setattr(torch_backend, "BREAK_EVEN", 40)
    small = rows * 8 < 40 and device == "cpu"
    with warnings.catch_warnings(), counted_calls() as made:
        warnings.simplefilter("error")
        layer(torch.ones(rows, 8, device=device)).sum().backward()
    assert (not made) == small
    assert fallbacks_of(layer) == ({calls.SMALL: 1} if small else {})
    report = str(layers.describe({"0": layer}))
    assert ("fewer than 40 elements run PEFT's forward" in report) == (device == "cpu")


@pytest.mark.parametrize("kwargs", [{}, {"alora_offsets": [3]}], ids=["x", "with offsets"])
def test_alora_has_one_reason(kwargs: Any) -> None:
    layer = layer_of(alora_invocation_tokens=[1])
    assert calls.decide(layer, x_of(), (), kwargs) == "the adapter is a variant (ALoraLinearVariant)"


@pytest.mark.parametrize(("args", "kwargs"), [((3,), {}), ((), {"other": 3})])
def test_more_arguments_than_x_are_pefts(args: Any, kwargs: Any) -> None:
    layer = layer_of()
    with counted_calls() as made, pytest.raises(TypeError):
        layer(x_of(), *args, **kwargs)
    assert not made
    assert fallbacks_of(layer) == {"the layer is called with more than x": 1}
    assert layer(x=x_of(), adapter_names=None, alora_offsets=None).shape == (5, 12)
    assert sum(fallbacks_of(layer).values()) == 1, "None counts as no argument"
