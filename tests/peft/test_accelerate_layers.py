"""accelerate on PEFT's embeddings and convolutions: what it takes, what it leaves and why, and parity with PEFT's layers."""

import copy
from typing import Any

import peft
import pytest
import torch
from layer_parity import assert_as_accurate, of_peft, results
from peft_layer import fallbacks_of
from torch import Tensor, nn

import fastlora
from fastlora import oracle
from fastlora.peft import conv, layers
from fastlora.peft.report import COPIED, SMALL

IDS = torch.randint(50, (9, 60), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))

#: name -> (PEFT's base layer, x that a CPU computes fused, or None)
TAKEN: dict[str, tuple[nn.Module, Tensor | None]] = {
    "embedding": (nn.Embedding(50, 32, padding_idx=4), IDS),
    "Conv1d": (nn.Conv1d(6, 8, 1), PIXELS.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)),
    "Conv2d": (nn.Conv2d(6, 8, 1, bias=False), PIXELS.to(memory_format=torch.channels_last)),
    "Conv2d patches": (nn.Conv2d(6, 8, 2, stride=2), None),
    "Conv3d patches": (nn.Conv3d(6, 8, (1, 2, 2), stride=(1, 2, 2)), None),
}

SCALED = nn.Embedding(9, 4)
SCALED.embed_scale = torch.tensor(2.0)


def accelerated(base: nn.Module, dtypes=oracle.DTYPES[0], **options: Any) -> tuple[Any, Any]:
    """(accelerated layer, PEFT's)."""
    torch.manual_seed(0)
    layer = of_peft(base, dtypes, **options)
    own = copy.deepcopy(layer)
    assert fastlora.accelerate(nn.ModuleList([own])).taken == ("0",)
    return own, layer


@pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, (_, x) in TAKEN.items() if x is not None])
def test_parity(name, dtypes):
    base, x = TAKEN[name]
    assert x is not None
    own, layer = accelerated(base, dtypes)
    assert_as_accurate(own, layer, x.to(dtypes[0]) if x.is_floating_point() else x)
    assert fallbacks_of(own) == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TAKEN)
def test_a_fallback_is_pefts_to_the_bit_and_decelerate_restores(name):
    base, _ = TAKEN[name]
    own, layer = accelerated(base)
    x = IDS[:1] if name == "embedding" else torch.randn(2, 6, *[4] * (base.weight.dim() - 2))
    found, expected = results(own, x), results(layer, x)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert fallbacks_of(own) == {SMALL if name == "embedding" else COPIED: 1}
    model = nn.ModuleList([own])
    assert fastlora.decelerate(model) == 1
    assert type(own) is type(layer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.enable_adapters(False), "adapters are disabled"),
        (lambda layer: layer.merge(), "adapters are merged"),
        (lambda layer: layer.base_layer.weight.requires_grad_(True), "its base weight is trainable"),
        (
            lambda layer: layer.base_layer.register_forward_hook(lambda *args: None),
            "its base layer has hooks, or a forward of its own",
        ),
        (
            lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
            "its scaling is a tensor",
        ),
    ],
)
@pytest.mark.parametrize("name", ["embedding", "Conv2d"])
def test_states_that_run_pefts_forward(name, change, reason):
    base, x = TAKEN[name]
    own, layer = accelerated(base)
    for each in (own, layer):
        change(each)
    assert torch.equal(own.eval()(x), layer.eval()(x))
    assert [found.startswith(reason) for found in fallbacks_of(own)] == [True]
    assert layers.describe({"0": own}).waiting[0][1].startswith(reason)


@pytest.mark.filterwarnings("ignore:fastlora")
@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), conv.OVERLAPS),
        (nn.Conv1d(6, 8, 1, padding=1), conv.OVERLAPS),
        (nn.Embedding(9, 4, max_norm=1.0), "its base layer has max_norm or sparse gradients"),
        (SCALED, "its base layer has an embed_scale"),
        (nn.Embedding(9, 4, sparse=True), "its base layer has max_norm or sparse gradients"),
        (type("Odd", (nn.Embedding,), {})(9, 4), "its base layer is a "),
    ],
)
def test_what_is_left(base, reason):
    layer = of_peft(base)
    ((name, found),) = fastlora.accelerate(nn.ModuleList([layer])).left
    assert name == "0"
    assert found.startswith(reason)


def test_an_embedding_of_peft_0_18_has_no_input_fns():
    layer = of_peft(nn.Embedding(9, 4))
    vars(layer).pop("input_fns", None)
    assert not fastlora.accelerate(nn.ModuleList([layer])).left


def test_dropout_of_a_pointwise_convolution_is_one_mask():
    own, _ = accelerated(TAKEN["Conv2d"][0], lora_dropout=0.5)
    x = TAKEN["Conv2d"][1]
    assert x is not None
    torch.manual_seed(1)
    first = own(x)
    torch.manual_seed(1)
    assert torch.equal(own(x), first)
    assert not torch.equal(own(x), first)
    assert fallbacks_of(own) == {}
    base = own.base_layer(x)
    assert not torch.allclose(own.eval()(x) - base, first - base)


def test_a_model_with_all_types_reports_each():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.point, self.out = (
                nn.Embedding(9, 6),
                nn.Conv1d(6, 6, 3),
                nn.Conv1d(6, 6, 1),
                nn.Linear(6, 2),
            )

    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["embed", "conv", "point", "out"], r=2))
    with pytest.warns(UserWarning, match="3 of 4 LoRA layers accelerated"):
        report = fastlora.accelerate(model)
    assert report.left == (("base_model.model.conv", conv.OVERLAPS),)
    assert "left, its windows overlap" in repr(report)
