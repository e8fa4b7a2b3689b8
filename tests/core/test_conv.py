"""FusedLoraConv beside PEFT's layers: forward, gradients, dropout, merging, and bad input."""

import copy
from functools import partial

import pytest
import torch
from layer_parity import assert_as_accurate, factors, of_peft, ours, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora import FusedLoraConv, dropout_mask, inject, load_adapter, merge_and_unload, oracle, save_adapter
from fastlora.dropout import draw_seed, keep_scale
from fastlora.layers.conv import is_linear, windows

#: name -> (convolution, shape of x, whether it is a linear on a view of x)
CONVS: dict[str, tuple[nn.Module, tuple[int, ...], bool]] = {
    "1d": (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11), False),
    "1d same": (nn.Conv1d(6, 8, 4, padding="same", bias=False), (2, 6, 11), False),
    "1d patches": (nn.Conv1d(6, 8, 4, stride=4, padding="valid"), (2, 6, 19), True),
    "2d strided": (nn.Conv2d(6, 8, 3, stride=2, padding=(1, 0), bias=False), (2, 6, 9, 8), False),
    "2d gaps": (nn.Conv2d(6, 8, (2, 1), stride=(3, 1)), (2, 6, 9, 8), False),
    "2d groups": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 7), False),
    "2d pointwise": (nn.Conv2d(6, 8, 1, padding_mode="circular"), (2, 6, 5, 7), True),
    "2d pointwise strided": (nn.Conv2d(6, 8, 1, stride=2, bias=False), (2, 6, 5, 7), True),
    "2d patches": (nn.Conv2d(6, 8, (3, 2), stride=(3, 2)), (2, 6, 10, 9), True),
    "2d patches, no batch": (nn.Conv2d(6, 8, 2, stride=2), (6, 4, 4), True),
    "3d": (nn.Conv3d(6, 8, 2, padding=1), (2, 6, 3, 4, 3), False),
    "3d patches": (nn.Conv3d(6, 8, (2, 1, 2), stride=(2, 1, 2)), (2, 6, 4, 3, 5), True),
}
LINEAR = [name for name, (_, _, is_linear) in CONVS.items() if is_linear]
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


def case(name: str, dtypes=oracle.DTYPES[0], **options):
    """Our layer, PEFT's of the same values, and an x."""
    base, shape, _ = CONVS[name]
    layer = of_peft(base, dtypes, **options)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtypes[0])
    return ours(FusedLoraConv, layer), layer, x


@pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_parity_with_peft(name, dtypes):
    own, layer, x = case(name, dtypes)
    assert is_linear(own) == CONVS[name][2]
    assert_as_accurate(own, layer, x)


class Masked(nn.Module):
    """Dropout of x by the mask that `lora_linear` draws for a convolution's windows, which hold each element of x once."""

    def __init__(self, own: FusedLoraConv, p: float) -> None:
        super().__init__()
        self.windows, self.p = partial(windows, own.to_plain(merged=False)), p

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        y = x.detach().requires_grad_()
        rows = self.windows(y)
        mask = dropout_mask(draw_seed("cpu"), rows[..., 0].numel(), rows.shape[-1], self.p).view(rows.shape)
        kept = torch.autograd.grad(rows, y, mask.to(rows.dtype))[0]
        return x * kept * keep_scale(self.p)


@pytest.mark.parametrize("name", LINEAR)
def test_dropout_of_a_linear_convolution(name):
    own, layer, x = case(name, lora_dropout=0.4)
    layer.lora_dropout["default"] = Masked(own, 0.4)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return FusedLoraConv.forward(own, x)

    own.forward = seeded
    assert_as_accurate(own, layer, x)
    own.eval()
    del own.forward
    layer.lora_dropout["default"] = nn.Identity()
    assert_as_accurate(own, layer, x)


def test_dropout_of_other_convolutions_is_torchs():
    own, layer, x = case("1d", lora_dropout=0.4)
    found = []
    for each in (own, layer):
        torch.manual_seed(7)
        found.append(each(x).detach())
    assert oracle.relative_error(*found) <= oracle.FLOOR[oracle.DTYPES[0]]
    assert oracle.relative_error(found[0], own.eval()(x).detach()) > 1e-3


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_channels_last(memory_format):
    for name in ("2d pointwise", "2d patches", "2d strided"):
        own, layer, x = case(name)
        assert_as_accurate(own.to(memory_format=memory_format), layer, x.to(memory_format=memory_format))
        assert own(x.contiguous()).is_contiguous() or memory_format == torch.channels_last


def test_dilation_reaches_the_update_where_peft_ignores_it(tmp_path):
    base, x = nn.Conv2d(6, 8, 3, padding=2, dilation=2), torch.randn(2, 6, 9, 9)
    own = FusedLoraConv.from_module(base, r=4)
    nn.init.normal_(own.lora_B)
    merged = copy.deepcopy(own).eval()
    merged.merge()
    assert oracle.relative_error(own(x).detach(), merged(x).detach()) <= oracle.FLOOR[oracle.DTYPES[0]]
    with pytest.raises(RuntimeError, match="must match"):
        of_peft(base)(x)
    model = inject(nn.Sequential(base), target_modules=["0"], r=4)
    with pytest.warns(UserWarning, match="'0' has a dilation, which PEFT's lora_A ignores"):
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="'0' has a dilation"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", [name for name in CONVS if name != "2d groups"])
def test_merge_and_plain_module(name):
    own, layer, x = case(name)
    expected, base = own(x).detach(), own.weight.detach().clone()
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    plain = own.eval().to_plain(merged=True)
    assert repr(plain) == repr(CONVS[name][0])
    bound = max(oracle.FLOOR[oracle.DTYPES[0]], 2 * oracle.relative_error(expected, exact))
    for module in (plain, own):
        own.merged or own.merge()
        assert oracle.relative_error(module(x).detach(), exact) <= bound
    own.unmerge()
    assert torch.equal(own.weight, base)


def test_compile_and_checkpoint():
    for name in ("2d patches", "2d strided"):
        own, _, x = case(name)
        expected = results(own, x)
        for call in (
            torch.compile(own, fullgraph=True, backend="aot_eager"),
            lambda x, own=own: checkpoint(own, x, use_reentrant=False),
        ):
            y = call(x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
            grads = torch.autograd.grad(y, list(factors(own).values()), dy)
            assert all(map(torch.equal, (y, *grads), (expected[name] for name in ("y", "dA", "dB"))))


def test_grouped_convolutions_are_not_merged_and_nothing_changes():
    own, _, x = case("2d groups")
    with pytest.raises(RuntimeError, match=r"merge\(\) is not possible: with groups=2 the update reads all channels"):
        own.merge()
    model = inject(nn.Sequential(nn.Conv2d(6, 6, 1), copy.deepcopy(CONVS["2d groups"][0])), target_modules=["0", "1"], r=4)
    before = model(x)
    with pytest.raises(ValueError, match="'1' cannot be merged: with groups=2"):
        merge_and_unload(model)
    assert isinstance(model[0], FusedLoraConv)
    assert torch.equal(model(x), before)


class Odd(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda own: own(torch.randn(2, 5, 9, 8)), ValueError, r"x must be \(N, 6, \*, \*\) or without N, got shape \(2, 5"),
        (lambda own: own(torch.randn(6, 9)), ValueError, r"x must be \(N, 6, \*, \*\)"),
        (lambda own: own(torch.randn(2, 6, 2, 8)), ValueError, "dimension 2 is smaller than the kernel's 3"),
        (lambda own: own(torch.randn(2, 6, 9, 8).double()), TypeError, "weight is torch.float32 but x is torch.float64"),
        (lambda own: own.requires_grad_(True)(torch.randn(2, 6, 9, 8)), ValueError, "weight requires grad"),
        (lambda own: FusedLoraConv.from_module(Odd(3, 4, 1)), TypeError, "no subclass of them, got Odd"),
        (lambda own: FusedLoraConv.from_module(nn.ConvTranspose2d(3, 4, 1)), TypeError, "got ConvTranspose2d"),
        (
            lambda own: FusedLoraConv.from_module(nn.Conv2d(4, 4, 1, groups=4), r=6),
            ValueError,
            "r=6 must be a multiple",
        ),
        (
            lambda own: FusedLoraConv.from_module(nn.Conv2d(4, 4, 1, groups=4), merge_weights=True),
            ValueError,
            "merge_weights=True is not possible with groups=4",
        ),
        (
            lambda own: FusedLoraConv.from_module(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
            ValueError,
            "padding_mode='circular', expected 'zeros'",
        ),
        (lambda own: FusedLoraConv.from_module(nn.Conv2d(4, 4, 1), adapter_dtype=torch.half), TypeError, "the adapters must"),
    ],
)
def test_bad_input(call, error, message):
    own, _, _ = case("2d patches")
    with pytest.raises(error, match=message):
        call(own)
