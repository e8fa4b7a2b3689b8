"""Encoders of torch in evaluation: their fast path, which leaves adapters out, is never taken."""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fastlora import inject, merge_and_unload, oracle, unload

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [4]])
FLOOR = oracle.FLOOR[torch.float32, torch.float32]


def layer(**options: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options).eval()


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer(), 2).eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "layer": layer,
    "norm first": lambda: layer(norm_first=True),
    "encoder": encoder,
    "inside": lambda: nn.Sequential(encoder()),
}


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def adapted(model: nn.Module) -> nn.Module:
    inject(model, target_modules=["linear1", "linear2"], r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model


def evaluated(model: nn.Module) -> Tensor:
    """What inference gives for the rows that are not padding."""
    with torch.inference_mode():
        if isinstance(model, nn.Sequential):
            return model(X)
        return model(X, src_key_padding_mask=PADDING)[~PADDING]


def slow(model: nn.Module) -> Tensor:
    """The same without any fast path."""
    torch.backends.mha.set_fastpath_enabled(False)
    y = evaluated(model)
    torch.backends.mha.set_fastpath_enabled(True)
    return y


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("builder", BUILDERS)
def test_evaluation_sees_the_adapters(builder: str) -> None:
    model = adapted(BUILDERS[builder]())
    expected = slow(model)
    assert oracle.relative_error(evaluated(BUILDERS[builder]()), expected.double()) > 1e-2, "adapters that matter"
    for each in (model, reloaded(model)):
        assert oracle.relative_error(evaluated(each), expected.double()) <= FLOOR


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("back", [unload, merge_and_unload])
def test_the_plain_model_has_its_fast_path_back(builder: str, back: Callable[[nn.Module], nn.Module]) -> None:
    model, plain = back(adapted(BUILDERS[builder]())), BUILDERS[builder]()
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(module, flag, None) == getattr(other, flag, None)
        assert vars(module).keys() == vars(other).keys()
    assert oracle.relative_error(evaluated(model), slow(model).double()) <= FLOOR


def test_encoders_without_targets_keep_their_fast_path() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 8)})
    inject(model, target_modules=["head", "encoder.layers.1.linear1"], r=1)
    assert [layer.activation_relu_or_gelu for layer in model["encoder"].layers] == [1, 0]
    assert not model["encoder"].use_nested_tensor
