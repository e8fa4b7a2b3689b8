"""FusedLoraEmbedding beside PEFT's layer: forward, gradients, merging, what is saved for backward, and bad input."""

import copy
import warnings

import pytest
import torch
from layer_parity import assert_as_accurate, factors, of_peft, ours, results
from saved import saved_by
from torch import nn

from fastlora import FusedLoraEmbedding, oracle

NUM, DIM = 40, 24
IDS = torch.randint(NUM, (6, 9), generator=torch.Generator().manual_seed(0))


def embedding(**options) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(NUM, DIM, **options)


def pair(**options):
    """Our layer and PEFT's, of the same values."""
    layer = of_peft(embedding(), **options)
    return ours(FusedLoraEmbedding, layer), layer


@pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1, "scale_grad_by_freq": True}], ids=str)
def test_parity_with_peft(dtypes, options):
    layer = of_peft(embedding(**options), dtypes, lora_dropout=0.5)  # which an embedding does not apply
    ids = IDS.clone()
    ids[0, :4] = torch.tensor([3, NUM - 1, 7, 7])
    assert_as_accurate(ours(FusedLoraEmbedding, layer), layer, ids)


@pytest.mark.parametrize("ids", [IDS.int(), IDS[:, ::2], IDS[:0], IDS[0, 0]], ids=["int32", "strided", "empty", "scalar"])
def test_ids_of_any_form(ids):
    own, layer = pair()
    assert_as_accurate(own, layer, ids)


def test_a_new_layer_is_the_embedding_and_shares_its_weight():
    base = embedding(padding_idx=2, dtype=torch.bfloat16).eval()
    own = FusedLoraEmbedding.from_module(base, r=4, adapter_dtype=torch.float32)
    assert own.weight.data_ptr() == base.weight.data_ptr()
    assert torch.equal(own(IDS), base(IDS))
    assert (own.training, own.lora_embedding_A.dtype, own.padding_idx) == (False, torch.float32, 2)
    assert not own.lora_embedding_A.any()
    assert 0.8 < own.lora_embedding_B.std() < 1.2
    assert [name for name, p in own.named_parameters() if p.requires_grad] == ["lora_embedding_A", "lora_embedding_B"]
    assert repr(own) == "FusedLoraEmbedding(40, 24, padding_idx=2, r=4, lora_alpha=8, lora_dropout=0.0)"


def test_backward_saves_no_activation_and_repeats_its_bits():
    own, _ = pair()
    sizes = sorted(tensor.numel() for tensor in saved_by(lambda: own(IDS)))
    assert sizes == sorted([IDS.numel(), 4 * NUM, 4 * DIM])
    first, again = results(own, IDS), results(own, IDS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    own.lora_embedding_A.requires_grad_(False)
    own(IDS).sum().backward()
    assert own.lora_embedding_A.grad is None
    assert own.lora_embedding_B.grad.any()


@pytest.mark.parametrize("dtypes", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("keep_base", [True, False])
def test_merge_and_state_dict(dtypes, keep_base):
    layer = of_peft(embedding(), dtypes)
    own = ours(FusedLoraEmbedding, layer)
    expected, base, exact = own(IDS).detach(), own.weight.detach().clone(), copy.deepcopy(layer).double()(IDS).detach()
    state = own.state_dict()
    own.eval().merge(keep_base)
    floor = oracle.FLOOR[dtypes[0], dtypes[0]]
    assert oracle.relative_error(own(IDS), exact) <= max(floor, 2 * oracle.relative_error(expected, exact))
    assert list(own.state_dict()) == list(state) == ["weight", "lora_embedding_A", "lora_embedding_B"]
    twin = FusedLoraEmbedding.from_module(embedding(dtype=dtypes[0]), r=4, lora_alpha=6, adapter_dtype=dtypes[1])
    twin.load_state_dict(own.state_dict())
    assert torch.equal(twin(IDS), expected if keep_base else own(IDS))
    if keep_base:
        own.unmerge()
        assert torch.equal(own.weight, base)


def test_compile_and_checkpoint():
    own, _ = pair()
    expected = results(own, IDS)
    for call in (
        torch.compile(own, fullgraph=True, backend="aot_eager"),
        lambda ids: torch.utils.checkpoint.checkpoint(own, ids, use_reentrant=False),
    ):
        y = call(IDS)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        grads = torch.autograd.grad(y, list(factors(own).values()), dy)
        assert all(map(torch.equal, (y, *grads), (expected[name] for name in ("y", "dA", "dB"))))


def test_autocast_changes_nothing():
    own, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y = own(IDS)
    assert torch.equal(y, own(IDS))


class Scaled(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda own: own(IDS.float()), TypeError, "ids must be an int64 or int32 tensor, got torch.float32"),
        (lambda own: own([1, 2]), TypeError, "ids must be an int64 or int32 tensor, got list"),
        (lambda own: own(IDS + 2), IndexError, r"ids must be in \[0, 40\), got values from 2 to 41"),
        (lambda own: own(IDS - 1), IndexError, r"ids must be in \[0, 40\), got values from -1 to"),
        (lambda own: own.requires_grad_(True)(IDS), ValueError, "weight requires grad"),
        (lambda own: FusedLoraEmbedding.from_module(Scaled(3, 4)), TypeError, "no subclass of it, got Scaled"),
        (lambda own: FusedLoraEmbedding.from_module(nn.Linear(3, 4)), TypeError, "must be an nn.Embedding.*got Linear"),
        (lambda own: FusedLoraEmbedding.from_module(embedding(max_norm=1.0)), ValueError, "max_norm=1.0.*expected None"),
        (lambda own: FusedLoraEmbedding.from_module(embedding(sparse=True)), ValueError, "sparse=True.*expected False"),
        (lambda own: FusedLoraEmbedding.from_module(embedding(), r=-1), ValueError, "r must be >= 0, got -1"),
        (lambda own: FusedLoraEmbedding.from_module(embedding(), lora_dropout=2), ValueError, "lora_dropout must be in"),
        (lambda own: FusedLoraEmbedding.from_module(embedding(), use_dora=True), ValueError, "is for linears, not for a Fused"),
        (
            lambda own: FusedLoraEmbedding.from_module(embedding(), adapter_dtype=torch.float16),
            TypeError,
            "lora_A and lora_B are torch.float16 but weight is torch.float32",
        ),
    ],
)
def test_bad_input(call, error, message):
    own, _ = pair()
    with pytest.raises(error, match=message):
        call(own)


def test_second_derivatives_are_refused():
    own, _ = pair()
    with pytest.raises(RuntimeError, match="the embedding has no second derivative"):
        torch.autograd.grad(own(IDS).square().sum(), own.lora_embedding_B, create_graph=True)


def test_a_rank_above_the_width_warns_at_the_caller():
    with pytest.warns(UserWarning, match="r=30 is above") as caught:
        FusedLoraEmbedding.from_module(embedding(), r=30)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(FusedLoraEmbedding.from_module(embedding(), r=0)(IDS), embedding()(IDS))
