"""The parts of fastlora finetune by themselves: data, what is counted as saved, the control's noise, progress."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.cli import progress
from fastlora.finetune import check, data
from fastlora.finetune.eager import EagerLoraLinear
from fastlora.finetune.model import with_adapters
from fastlora.finetune.settings import Settings
from fastlora.finetune.train import kept_for_backward
from fastlora.modules import FusedLoraLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    corpora = [data.load_corpus()]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("\n\n".join(f"Paragraph {i % 90} of a text, {i % 7}." for i in range(900)))
    (tmp_path / "notes" / "b.txt").write_text("\n\n".join(f"Paragraph {i % 80} of a text, {i % 7}." for i in range(900)))
    (tmp_path / "notes" / "c.bin").write_bytes(b"\xff")
    corpora.append(data.load_corpus([tmp_path / "notes"]))
    for corpus in corpora:
        assert not paragraphs(corpus.held_out) & (paragraphs(corpus.adapt) | paragraphs(corpus.pretrain))
        share = len(corpus.held_out) / len(corpus.adapt + corpus.held_out)
        assert 0.1 < share < 0.2
    assert len(corpora[0].pretrain) > 100_000


def test_batches_are_windows_of_the_stream_and_repeat() -> None:
    stream = torch.arange(100)
    first, second = (list(islice(data.batches(stream, 3, 10, seed=5), 4)) for _ in range(2))
    for batch, same in zip(first, second, strict=True):
        assert torch.equal(batch, same)
        assert torch.equal(batch - batch[:, :1], torch.arange(10).expand(3, 10))
    assert len({int(batch[0, 0]) for batch in first}) > 1


class OneLayer(nn.Module):
    """The least causal language model: embedding, one LoRA linear to the logits."""

    def __init__(self, layer: type[FusedLoraLinear]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.head = layer(16, 11, r=2, lora_dropout=0.5)

    def forward(self, input_ids: Tensor) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.embedding(input_ids)))


def test_kept_for_backward_is_what_the_layers_keep() -> None:
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    eager, fused = (kept_for_backward(OneLayer(layer), ids) for layer in (EagerLoraLinear, FusedLoraLinear))
    rows, width = 21, 16
    # Both keep S. Eager keeps the dropped copy (float32) and the mask (bool), fused x (float32) and the seed (int64).
    assert eager - fused == rows * width * (4 + 1) - (rows * width * 4 + 8)


def test_control_noise_has_the_size_asked_for() -> None:
    layers = nn.ModuleDict({"layer": EagerLoraLinear(64, 48, r=4)})
    layer = layers["layer"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    x = torch.randn(128, 64, generator=generator, requires_grad=True)

    def results() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), torch.ones_like(y))]

    plain = results()
    sizes = dict(zip(check.OUTPUTS, (1e-1, 1e-2, 1e-3, 1e-4), strict=True))
    check.disturb(layers, [check.LayerError("layer", output, 0.0, 0.0, size) for output, size in sizes.items()], seed=0)
    for result, expected, size in zip(results(), plain, sizes.values(), strict=True):
        assert float((result - expected).norm() / expected.norm()) == pytest.approx(size, rel=0.2)


class TwoBranches(nn.Module):
    """Embedding and head, the head called twice with different rows; two LoRA linears that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one = OneLayer(EagerLoraLinear)
        self.uncalled = EagerLoraLinear(4, 4, r=2)
        self.unread = EagerLoraLinear(16, 4, r=2)

    def forward(self, input_ids: Tensor) -> Any:
        self.unread(self.one.embedding(input_ids))
        logits = torch.cat([self.one(part).logits for part in (input_ids[:1], input_ids[1:])])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_layers_that_no_loss_reaches_are_neither_judged_nor_disturbed() -> None:
    model = TwoBranches()
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    errors, unreached = check.check_layers(model, ids, seed=0)
    assert unreached == ["uncalled", "unread"]
    assert [(error.layer, error.output) for error in errors] == [("one.head", output) for output in check.OUTPUTS]
    assert all(error.passed for error in errors)
    check.disturb(model, errors, seed=0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.uncalled(x), model.uncalled.eval()(x))


def test_the_backend_asked_for_reaches_every_layer() -> None:
    settings = Settings(target_modules=("first", "second"), r=2, backend="triton")
    base = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    layers = with_adapters(base, settings, FusedLoraLinear).values()
    assert [layer.backend for layer in layers] == ["triton", "triton"]
    assert with_adapters(base, Settings(target_modules=("first",), r=2), FusedLoraLinear)["first"].backend is None


@pytest.mark.parametrize("kind", [progress.Bars, progress.Lines, progress.Silent])
def test_progress(kind: type[progress.Silent], capsys: pytest.CaptureFixture[str]) -> None:
    with kind() as hears:
        for phase, steps in (("pretrain", 50), ("adapt", 3)):
            for step in range(1, steps + 1):
                hears(phase, step, steps, {"eager": 2.5, "fused": 2.25}, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    if kind is progress.Silent:
        assert err == ""
    else:
        assert "50/50" in err
        assert "eager 2.500  fused 2.250" in err
        assert "tokens/s" in err
    if kind is progress.Lines:
        assert len(err.splitlines()) == progress.LINES_PER_PHASE + 3
