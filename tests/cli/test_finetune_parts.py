"""The parts of fastlora finetune by themselves: options, data, saved bytes, the control's noise, progress."""

import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import oracle
from fastlora.cli import main, progress
from fastlora.finetune import data
from fastlora.finetune.eager import EagerLoraLinear
from fastlora.modules import FusedLoraLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from fastlora.finetune import check, model, train  # noqa: E402  # they need transformers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps: got '0', expected an integer of at least 1"),
        ("--steps many", "--steps: got 'many', expected an integer of at least 1"),
        ("--r 0", "--r/--rank: got '0'"),
        ("--batch-size -1", "--batch-size: got '-1'"),
        ("--seq-len 1", "--seq-len: got '1', expected an integer of at least 2"),
        ("--seq-len 100000", "are too few for seq_len=100000"),
        ("--dropout 1", "--dropout: got '1', expected a rate in [0, 1)"),
        ("--dropout nan", "--dropout: got 'nan'"),
        ("--lr inf", "--lr: got 'inf', expected a finite number above 0"),
        ("--pretrain-steps -1", "--pretrain-steps: got '-1', expected an integer of at least 0"),
        ("--alpha 0", "--alpha: got '0'"),
        ("--seed -1", "--seed: got '-1'"),
        ("--seed 9223372036854775808", "expected an integer in [0, 2**63)"),
        ("--threads 0", "--threads: must be an integer >= 1, got '0'"),
        ("--hidden-size 33", "--hidden-size: got '33', expected a multiple of 32"),
        ("--adapter-dtype bfloat16", "--adapter-dtype: got 'bfloat16', expected float32"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--device cuda:99", "is not there"),
        ("--device nonsense", "must be cpu, cuda or cuda:N"),
        ("--target-modules q_prj", "near names: q_proj"),
        ("--target-modules (q", "is not a regular expression"),
        ("--model nowhere", "--model: 'nowhere' is not a Hugging Face model folder"),
        ("--model model --seq-len 4096", "--seq-len: got 4096, expected at most the 2048 positions"),
        ("--model small", "its vocabulary of 100 is too small for bytes"),
        ("--text nowhere.txt", "--text: 'nowhere.txt' cannot be read"),
        ("--text empty", "holds no .md, .rst, .txt file"),
        ("--text binary.txt", "--text: 'binary.txt' cannot be read, expected UTF-8 text"),
        ("--text short.txt", "too few"),
        ("--output file", "--output: 'file' is a file"),
    ],
)
def test_wrong_arguments(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("training was started"))
    Path("empty").mkdir()
    for name, content in (("binary.txt", b"\xff\xfe\x00"), ("short.txt", b"too short"), ("file", b"")):
        Path(name).write_bytes(content)
    transformers.LlamaConfig(max_position_embeddings=2048).save_pretrained("model")
    transformers.LlamaConfig(vocab_size=100).save_pretrained("small")
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(["finetune", *options.split()])
    except SystemExit as leaving:  # argparse's own checks
        code = leaving.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_backend_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastlora.cli.finetune.available_backends", lambda device: ("torch",))
    assert main(["finetune", "--backend", "triton", "--device", "cpu"]) == 2
    assert "--backend: got 'triton', expected torch on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "k_proj"], ("q_proj", "k_proj")),
        ([r".*\.(q|k)_proj"], r".*\.(q|k)_proj"),
    ],
)
def test_targets_from_the_command_line(monkeypatch: pytest.MonkeyPatch, values: list[str], targets: object) -> None:
    def stop(args: Namespace) -> None:
        assert args.target_modules == targets
        raise ValueError("enough")

    monkeypatch.setattr(train, "prepare", stop)
    assert main(["finetune", "--target-modules", *values]) == 2


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises((SystemExit, ModuleNotFoundError), match="matplotlib"):
        main(["finetune"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("finetune", "parity", "bench"))


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n\n".join(f"Paragraph {i % 90} of a text, {i % 7}." for i in range(900)))
    (tmp_path / "b.txt").write_text("\n\n".join(f"Paragraph {i % 80} of a text, {i % 7}." for i in range(900)))
    (tmp_path / "c.bin").write_bytes(b"\xff")
    for corpus in (data.load_corpus(), data.load_corpus([tmp_path])):
        assert not paragraphs(corpus["held_out"]) & (paragraphs(corpus["adapt"]) | paragraphs(corpus["pretrain"]))
        assert 0.1 < len(corpus["held_out"]) / len(corpus["adapt"] + corpus["held_out"]) < 0.2
        assert len(corpus["pretrain"]) > 100_000


def test_batches_are_windows_of_the_stream_and_repeat() -> None:
    first, second = (torch.stack(list(islice(data.batches(torch.arange(100), 3, 10, seed=5), 4))) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first - first[..., :1], torch.arange(10).expand(4, 3, 10))
    assert len(first[:, 0, 0].unique()) > 1


class OneLayer(nn.Module):
    """The least causal language model: embedding, one LoRA linear to the logits."""

    def __init__(self, layer: type[FusedLoraLinear]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.head = layer(16, 11, r=2, lora_dropout=0.5)

    def forward(self, input_ids: Tensor) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.embedding(input_ids)))


IDS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))


def test_kept_for_backward_is_what_the_layers_keep() -> None:
    eager, fused = (train.kept_for_backward(OneLayer(layer), IDS) for layer in (EagerLoraLinear, FusedLoraLinear))
    rows, width = 21, 16
    # Both keep S. Eager keeps the dropped copy (float32) and the mask (bool), fused x (float32) and the seed (int64).
    assert eager - fused == rows * width * (4 + 1) - (rows * width * 4 + 8)


def test_control_noise_has_the_size_asked_for() -> None:
    layer = EagerLoraLinear(64, 48, r=4)
    generator = torch.Generator().manual_seed(0)
    layer.lora_B.data.normal_(generator=generator)
    x = torch.randn(128, 64, generator=generator, requires_grad=True)

    def results() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), torch.ones_like(y))]

    plain = results()
    case = oracle.Case((128, 64, 48))
    rows = [oracle.Row(case, output, 0.0, 0.0, 10.0**-n) for n, output in enumerate(check.OUTPUTS, 1)]
    check.disturb(nn.ModuleDict({"layer": layer}), {"layer": rows}, seed=0)
    for result, expected, row in zip(results(), plain, rows, strict=True):
        assert float((result - expected).norm() / expected.norm()) == pytest.approx(row.bound, rel=0.2)


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
    branches = TwoBranches()
    verdicts = check.check_layers(branches, IDS, seed=0)
    assert [row.output for row in verdicts.pop("one.head") if row.passed] == list(check.OUTPUTS)
    assert verdicts == {"uncalled": [], "unread": []}
    check.disturb(branches, verdicts, seed=0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(branches.uncalled(x), branches.uncalled.eval()(x))


@pytest.mark.parametrize("backend", ["triton", None])
def test_the_backend_asked_for_reaches_every_layer(backend: str | None) -> None:
    lora = {"target_modules": "all-linear", "r": 2, "alpha": 16.0, "dropout": 0.1, "adapter_dtype": "float32", "seed": 0}
    base = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    layers = model.with_adapters(base, Namespace(**lora, backend=backend), FusedLoraLinear).values()
    assert [layer.backend for layer in layers] == [backend, backend]


@pytest.mark.parametrize("kind", ["bars", "lines", "silent"])
def test_progress(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    if kind == "bars":
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the pipe for a terminal
    with progress.shown(silent=kind == "silent") as after_step:
        for phase, steps in (("pretrain", 50), ("adapt", 3)):
            for step in range(1, steps + 1):
                after_step(phase, step, steps, {"eager": 2.5, "fused": 2.25}, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("50/50" in err) == ("eager 2.500  fused 2.250" in err) == ("tokens/s" in err) == (kind != "silent")
    assert ("━" in err) == (kind == "bars")
    if kind != "bars":
        assert len(err.splitlines()) == {"lines": progress.LINES_PER_PHASE + 3, "silent": 0}[kind]
