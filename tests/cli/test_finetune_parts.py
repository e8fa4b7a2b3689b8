"""The parts of fastlora finetune by themselves: wrong arguments, the split of the text, the control's noise."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastlora import oracle
from fastlora.cli import main
from fastlora.finetune import data
from fastlora.reference import EagerLoraLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from fastlora.finetune import check, train  # noqa: E402  # they need transformers

#: what is expected -> options that are not
WRONG = {
    "must be an integer >= 1, got ": ("--steps 0", "--r 1.5", "--batch-size -1", "--threads 0", "--layers many"),
    "must be an integer >= 2, got '1'": ("--seq-len 1",),
    "must be an integer >= 0, got '-1'": ("--pretrain-steps -1",),
    "must be an integer in [0, 2**63), got ": ("--seed -1", "--seed 9223372036854775808"),
    "must be a rate in [0, 1), got ": ("--dropout 1", "--dropout nan"),
    "must be a finite number > 0, got ": ("--lr inf", "--alpha 0", "--pretrain-lr nan"),
    "must be a multiple of 32, the size of a head, got '33'": ("--hidden-size 33",),
    "must be cpu, cuda or cuda:N": ("--device nonsense",),
    "invalid choice: 'float8'": ("--dtype float8",),
    "got 'bfloat16', expected float32 unless --dtype is the same": ("--adapter-dtype bfloat16",),
    "got 'triton', expected torch on cpu": ("--backend triton --device cpu",),
    "near names: q_proj": ("--target-modules q_prj", "--target-modules q_prj x"),
    "is not a regular expression": ("--target-modules (q",),
    "'nowhere' is not a Hugging Face model folder": ("--model nowhere",),
    "got 4096, expected at most the 2048 positions": ("--seq-len 4096 --model model",),
    "its vocabulary of 100 is too small for bytes": ("--model small",),
    "'nowhere.txt' cannot be read": ("--text nowhere.txt",),
    "holds no .md, .rst, .txt file": ("--text empty",),
    "'binary.txt' cannot be read, expected UTF-8 text": ("--text binary.txt",),
    "give more text or a smaller --seq-len": ("--seq-len 100000", "--text file"),
    "'file' is a file, expected a folder or a new name": ("--output file",),
}


@pytest.mark.parametrize(("options", "message"), [(each, message) for message, all_ in WRONG.items() for each in all_])
def test_wrong_arguments(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("training was started"))
    monkeypatch.setattr("fastlora.cli.finetune.available_backends", lambda device: ("torch",))
    Path("empty").mkdir()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("file").touch()
    transformers.LlamaConfig(max_position_embeddings=2048).save_pretrained("model")
    transformers.LlamaConfig(vocab_size=100).save_pretrained("small")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=r"^2$"):  # argparse raises it, the command's own checks return the code
        raise SystemExit(main(["finetune", *options.split()]))
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert message in error
    assert options.split()[0].strip("-").replace("-", "_") in error.replace("-", "_")  # it names the option
    assert sorted(tmp_path.rglob("*")) == before


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_nothing_held_out_is_trained_on(tmp_path):
    for name, period in (("a.md", 90), ("b.txt", 80)):
        (tmp_path / name).write_text("\n\n".join(f"Paragraph {i % period} of a text, {i % 7}." for i in range(900)))
    (tmp_path / "c.bin").write_bytes(b"\xff")
    for corpus in (data.load_corpus(), data.load_corpus([tmp_path])):
        assert not paragraphs(corpus["held_out"]) & (paragraphs(corpus["adapt"]) | paragraphs(corpus["pretrain"]))
        assert 0.1 < len(corpus["held_out"]) / len(corpus["adapt"] + corpus["held_out"]) < 0.2
        assert len(corpus["pretrain"]) > 100_000


def test_control_noise_has_the_size_asked_for():
    layer = EagerLoraLinear(64, 48, r=4)
    generator = torch.Generator().manual_seed(0)
    layer.lora_B.data.normal_(generator=generator)
    x = torch.randn(128, 64, generator=generator, requires_grad=True)

    def results():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), torch.ones_like(y))]

    plain = results()
    rows = [oracle.Row(oracle.Case((128, 64, 48)), output, 0.0, 0.0, 10.0**-n) for n, output in enumerate(check.OUTPUTS, 1)]
    check.disturb(nn.ModuleDict({"layer": layer}), {"layer": rows}, seed=0)
    for result, expected, row in zip(results(), plain, rows, strict=True):
        assert float((result - expected).norm() / expected.norm()) == pytest.approx(row.bound, rel=0.2)
