"""fastlora finetune: it learns, it reports what happened, and its verdicts catch what is wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora.cli import main
from fastlora.dropout import draw_seed, dropout_mask, keep_scale
from fastlora.finetune import data, job
from fastlora.finetune.settings import Settings
from fastlora.modules import FusedLoraLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

SMALL = ["--hidden-size", "32", "--layers", "1", "--seq-len", "32", "--batch-size", "4", "--r", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand characters of Python's own prose: enough to adapt to, quick to evaluate on."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "debugger.txt"
    path.write_text(topics["debugger"][:12000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The output of one whole small run."""
    output = tmp_path_factory.mktemp("run") / "output"
    training = ["--pretrain-steps", "200", "--pretrain-lr", "4e-3", "--steps", "40"]
    assert main(["finetune", *SMALL, *training, "--text", str(text), "--output", str(output)]) == 0
    return output


def again(finished: Path, text: Path, output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Another run on the base model of `finished`: exit code and report."""
    arguments = ["finetune", "--model", str(finished / "base"), "--text", str(text), *SMALL, "--output", str(output)]
    code = main([*arguments, "--threads", "1", "--steps", "40", *options])
    return code, json.loads((output / "report.json").read_text())


def test_whole_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"adapter", "base", "loss.png", "report.json"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert report["passed"]
    assert [verdict["passed"] for verdict in report["verdicts"]] == [True] * 3
    for outcome in report["outcomes"].values():
        assert outcome["after"] < outcome["before"]
        assert outcome["gain"] == pytest.approx(outcome["before"] - outcome["after"])
        assert outcome["gain"] > 2 * outcome["gain_error"] > 0
        assert len(outcome["losses"]) == 40
        assert outcome["step_seconds"] > 0
    fused, eager = report["outcomes"]["fused"], report["outcomes"]["eager"]
    assert fused["saved_bytes"] < eager["saved_bytes"]
    differences = [abs(a - b) for a, b in zip(fused["losses"], eager["losses"], strict=True)]
    assert report["largest_difference"] == max(differences)
    assert 0 < report["curve_distance"] <= max(differences)
    assert {error["output"] for error in report["control"]["layers"]} == {"y", "dx", "dA", "dB"}
    assert len(report["control"]["layers"]) == 7 * 4
    assert report["control"]["unreached"] == []


def test_peft_reproduces_the_reported_loss(finished: Path, text: Path) -> None:
    """Base and adapter, as written, are the model that was measured."""
    report = json.loads((finished / "report.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(finished / "base")
    assert sum(p.numel() for p in base.parameters()) == report["parameters"] - report["trainable"]
    held_out = data.tokenize_corpus(data.load_corpus([text]), lambda text: list(text.encode()), 32).held_out

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(input_ids=held_out, labels=held_out).loss)

    before = loss(base)
    after = loss(peft.PeftModel.from_pretrained(base, finished / "adapter"))
    fused = report["outcomes"]["fused"]
    assert before == pytest.approx(fused["before"], rel=1e-5)  # two orders below the gain of the run
    assert after == pytest.approx(fused["after"], rel=1e-5)
    assert before - after > 1e-3 * before


def test_equal_settings_give_equal_runs(finished: Path, text: Path, tmp_path: Path) -> None:
    (_, first), (_, second) = (again(finished, text, tmp_path / name, "--no-check") for name in "ab")
    assert [o["losses"] for o in first["outcomes"].values()] == [o["losses"] for o in second["outcomes"].values()]
    _, other = again(finished, text, tmp_path / "c", "--no-check", "--seed", "1")
    assert other["outcomes"]["fused"]["losses"] != first["outcomes"]["fused"]["losses"]


def test_bfloat16_with_float32_adapters(finished: Path, text: Path, tmp_path: Path) -> None:
    code, report = again(finished, text, tmp_path, "--dtype", "bfloat16", "--target-modules", "q_proj", "v_proj")
    assert code == 0
    assert report["trainable"] == 2 * 2 * 32 * 4
    bounds = {error["output"]: error["bound"] for error in report["control"]["layers"]}
    assert bounds["dA"] < 1e-3 < bounds["y"]  # float32 quality where the adapters are float32


def test_kernels_under_the_interpreter(finished: Path, text: Path, tmp_path: Path) -> None:
    code, report = again(
        finished, text, tmp_path, "--backend", "triton", "--steps", "2", "--target-modules", "v_proj", "--no-check"
    )
    assert report["environment"]["backend"] == "triton"
    assert code in (0, 1)  # two steps need not be enough to learn
    assert report["curve_distance"] <= 2e-6 * max(report["outcomes"]["eager"]["losses"])


def wrong_layer(change: Callable[..., dict[str, Any]]) -> type[FusedLoraLinear]:
    """A layer that, in training, computes the reference with the arguments that `change` makes of the right ones."""

    class WrongLayer(FusedLoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            mask = dropout_mask(draw_seed(x.device), x.numel() // x.shape[-1], x.shape[-1], self.lora_dropout)
            right = {
                "x": x, "weight": self.weight, "lora_A": self.lora_A, "lora_B": self.lora_B, "bias": self.bias,
                "scaling": self.scaling, "dropout_p": self.lora_dropout, "keep_mask": mask,
            }  # fmt: skip
            return reference.lora_linear(**right | change(**right))

    return WrongLayer


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor + (tensor * (1 - factor)).detach()


@pytest.mark.parametrize(
    ("change", "curves"),
    [
        pytest.param(lambda scaling, **_: {"scaling": scaling * 1.001}, True, id="scaling off by 0.1 %"),
        pytest.param(lambda keep_mask, **_: {"keep_mask": keep_mask.roll(1, 0)}, True, id="mask shifted by a row"),
        pytest.param(lambda lora_B, **_: {"lora_B": lora_B.detach() + 0 * lora_B}, True, id="zero gradient of B"),
        # Adam divides a wrong scale of a gradient out again: only the layers can show it.
        pytest.param(
            lambda lora_A, dropout_p, **_: {"lora_A": scaled_gradient(lora_A, 1 / keep_scale(dropout_p))},
            False,
            id="dropout scale missing in dA",
        ),
    ],
)
def test_a_wrong_layer_fails(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, curves: bool
) -> None:
    monkeypatch.setattr(job, "FusedLoraLinear", wrong_layer(change))
    code, report = again(finished, text, tmp_path)
    _, layers_verdict, curves_verdict = report["verdicts"]
    assert code == 1
    assert not layers_verdict["passed"]
    assert not (curves and curves_verdict["passed"])


def test_the_right_layer_in_the_same_dress_passes(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "FusedLoraLinear", wrong_layer(lambda **_: {}))
    code, report = again(finished, text, tmp_path)
    assert code == 0
    assert report["largest_difference"] == 0.0


def test_a_layer_that_no_step_reaches_is_reported(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_unused_branch(settings: Settings) -> nn.Module:
        base = load_base(settings)
        base.add_module("unused", nn.Linear(8, 8))
        return base

    load_base = job.load_base
    monkeypatch.setattr(job, "load_base", with_unused_branch)
    code, report = again(finished, text, tmp_path)
    assert code == 0
    assert report["control"]["unreached"] == ["unused"]
    assert {error["layer"] for error in report["control"]["layers"]}.isdisjoint({"unused"})
    assert "not reached: unused" in report["verdicts"][1]["figures"]


def test_not_learning_fails(finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = again(finished, text, tmp_path, "--lr", "1e-12", "--no-check", "--steps", "3")
    assert code == 1
    assert [verdict["passed"] for verdict in report["verdicts"]] == [False, None, None]
    assert "FAILED" in capsys.readouterr().out


def test_diverging_fails_and_is_still_reported(finished: Path, text: Path, tmp_path: Path) -> None:
    code, report = again(finished, text, tmp_path, "--lr", "1e30", "--steps", "5")
    assert code == 1
    assert report["outcomes"]["fused"]["after"] is None  # NaN, which JSON cannot hold
    assert not report["passed"]


def test_json_is_all_there_is(finished: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, report = again(finished, text, tmp_path, "--json", "--no-check", "--steps", "2")
    out, err = capfd.readouterr()
    assert json.loads(out) == report
    assert err == ""
    assert code in (0, 1)


def test_the_models_own_tokenizer_is_used(finished: Path, text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    _, report = again(
        finished, text, tmp_path / "o", "--model", str(tmp_path / "model"), "--no-check", "--steps", "2", "--lr", "1e-3"
    )
    _, by_bytes = again(finished, text, tmp_path / "b", "--no-check", "--steps", "2")
    assert report["tokens"]["adapt"] < by_bytes["tokens"]["adapt"]  # merged pairs of bytes
    assert not (tmp_path / "o" / "base").exists()


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """The command sets torch's threads for its process; the tests share one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
