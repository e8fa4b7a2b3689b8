"""Files of embeddings and convolutions, both ways with PEFT, and files of another type of layer."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import our_name, randomise
from torch import Tensor, nn

from fastlora import from_pretrained, inject, load_adapter, oracle, print_trainable_parameters, save_adapter

pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")

IDS = torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(0))
TARGETS = ["embed", "line", "image", "volume", "patches"]
OPTIONS: dict[str, Any] = {"target_modules": TARGETS, "r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "lora_only"}


class Mixed(nn.Module):
    """One of each new type of layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8, padding_idx=0)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.image = nn.Conv2d(8, 8, (1, 3), groups=2, bias=False)
        self.volume = nn.Conv3d(4, 6, (2, 1, 3), padding=(0, 0, 1))
        self.patches = nn.Conv1d(6, 5, 2, stride=2)
        self.head = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.line(self.embed(ids).transpose(1, 2)).tanh()
        y = self.image(y.unsqueeze(2)).tanh().unflatten(1, (4, 2))
        y = self.volume(y).tanh().flatten(2)
        return self.head(self.patches(y).transpose(1, 2))


def mixed(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Mixed().to(dtype).eval()


def assert_same(model: nn.Module, by_peft: nn.Module, folder: Path) -> None:
    """The oracle's rule, with PEFT in float64 for the truth."""
    dtype = by_peft.get_parameter("base_model.model.head.weight").dtype
    exact = peft.PeftModel.from_pretrained(mixed(dtype).double(), folder, autocast_adapter_dtype=False).double()
    result, eager, truth, base = (m.eval()(IDS).detach() for m in (model, by_peft, exact, mixed(dtype)))
    bound = max(oracle.FLOOR[dtype, dtype], oracle.EAGER_FACTOR * oracle.relative_error(eager, truth))
    assert oracle.relative_error(result, truth) <= bound
    assert oracle.relative_error(base, truth) > 10 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    by_peft = randomise(peft.get_peft_model(mixed(dtype), peft.LoraConfig(**OPTIONS)))  # float32 factors
    by_peft.save_pretrained(tmp_path / "peft")
    made = from_pretrained(mixed(dtype), tmp_path / "peft", is_trainable=True)
    loaded = inject(mixed(dtype), **OPTIONS, adapter_dtype=torch.float32)
    load_adapter(loaded, tmp_path / "peft")
    theirs = {our_name(name): p for name, p in by_peft.named_parameters() if p.requires_grad}
    for model in (made, loaded):
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert own.keys() == theirs.keys()
        assert all(torch.equal(p, theirs[name]) for name, p in own.items())
        assert_same(model, by_peft, tmp_path / "peft")
    save_adapter(loaded, tmp_path / "ours")
    assert_same(loaded, peft.PeftModel.from_pretrained(mixed(dtype), tmp_path / "ours"), tmp_path / "peft")


def test_counts_are_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    print_trainable_parameters(inject(mixed(), **OPTIONS))
    peft.get_peft_model(mixed(), peft.LoraConfig(**OPTIONS)).print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (nn.Conv2d(6, 6, 1), nn.Conv1d(6, 6, 1), r"lora_A\.weight' has shape \(2, 6, 1, 1\), expected \(2, 6, 1\)"),
        (nn.Embedding(6, 6), nn.Linear(6, 6), r"lacks 2 keys .*lora_A\.weight', and has 2 keys .*lora_embedding_A'"),
    ],
)
def test_files_of_another_type_of_layer_are_refused(saved: nn.Module, other: nn.Module, message: str, tmp_path: Path) -> None:
    save_adapter(inject(nn.ModuleDict({"0": saved}), target_modules=["0"], r=2), tmp_path)
    model = nn.ModuleDict({"0": other})
    with pytest.raises(ValueError, match=message):
        from_pretrained(model, tmp_path)
    assert model["0"] is other
