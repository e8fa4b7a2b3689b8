"""Which inputs and surroundings of a call are fused, with PEFT's dtypes, and which are left to PEFT's forward, and counted."""

import contextlib
import copy
import warnings

import pytest
import torch
from peft_layer import layer_of, set_dtypes, x_of
from peft_models import counted_calls
from torch import Tensor
from torch.autograd import forward_ad

from fastlora import oracle
from fastlora.peft import calls, layers


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
