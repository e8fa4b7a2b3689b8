"""fastlora finetune: it learns, it reports what happened, and its verdicts find what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import dropout_mask, reference
from fastlora.cli import main
from fastlora.dropout import draw_seed, keep_scale
from fastlora.modules import FusedLoraLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from fastlora.finetune import data, train  # noqa: E402  # needs transformers

SMALL = ["--hidden-size", "32", "--layers", "1", "--seq-len", "32", "--batch-size", "4", "--r", "4"]

Again = Callable[..., tuple[int, dict[str, Any]]]


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
    training = ["--threads", "1", "--pretrain-steps", "200", "--pretrain-lr", "4e-3", "--steps", "40"]
    assert main(["finetune", *SMALL, *training, "--text", str(text), "--output", str(output)]) == 0
    return output


@pytest.fixture
def again(finished: Path, text: Path, tmp_path: Path) -> Again:
    """Another run on the base model of `finished`: exit code and report."""

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        arguments = ["finetune", "--model", str(finished / "base"), "--text", str(text), *SMALL, "--output", str(tmp_path)]
        code = main([*arguments, "--threads", "1", "--steps", "40", *options])
        return code, json.loads((tmp_path / "report.json").read_text())

    return run


def test_whole_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"adapter", "base", "loss.png", "report.json"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert report["passed"]
    assert [verdict["passed"] for verdict in report["verdicts"]] == [True] * 3
    for outcome in report["outcomes"].values():
        assert outcome["gain"] == pytest.approx(outcome["before"] - outcome["after"])
        assert outcome["gain"] > 2 * outcome["gain_error"] > 0
        assert len(outcome["losses"]) == 40
        assert outcome["step_seconds"] > 0
    fused, eager = report["outcomes"]["fused"], report["outcomes"]["eager"]
    assert fused["saved_bytes"] < eager["saved_bytes"]
    differences = [abs(a - b) for a, b in zip(fused["losses"], eager["losses"], strict=True)]
    assert report["largest_difference"] == max(differences)
    assert 0 < report["curve_distance"] <= max(differences)
    assert {row["output"] for row in report["control"]["layers"]} == {"y", "dx", "dA", "dB"}
    assert len(report["control"]["layers"]) == 7 * 4
    assert report["control"]["unreached"] == []
    assert {"cores", "threads", "backend", "torch", "device"} <= set(report["environment"])


def test_peft_reproduces_the_reported_loss(finished: Path, text: Path) -> None:
    """Base and adapter, as written, are the model that was measured."""
    report = json.loads((finished / "report.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(finished / "base")
    assert sum(p.numel() for p in base.parameters()) == report["parameters"] - report["trainable"]
    held_out = data.tokenize_corpus(data.load_corpus([text]), str.encode, 32)["held_out"]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(model(input_ids=held_out, labels=held_out).loss)

    before = loss(base)
    after = loss(peft.PeftModel.from_pretrained(base, finished / "adapter"))
    fused = report["outcomes"]["fused"]
    assert (before, after) == pytest.approx((fused["before"], fused["after"]), rel=1e-5)  # two orders below the gain
    assert before - after > 1e-3 * before


def test_equal_settings_give_equal_runs(again: Again) -> None:
    first, second, other = (again("--no-check", "--steps", "5", "--seed", seed)[1]["outcomes"] for seed in "001")
    assert [o["losses"] for o in first.values()] == [o["losses"] for o in second.values()]
    assert other["fused"]["losses"] != first["fused"]["losses"]


def test_bfloat16_with_float32_adapters(again: Again) -> None:
    code, report = again("--dtype", "bfloat16", "--target-modules", "q_proj", "v_proj")
    assert code == 0
    assert report["trainable"] == 2 * 2 * 32 * 4
    bounds = {row["output"]: row["bound"] for row in report["control"]["layers"]}
    assert bounds["dA"] < 1e-3 < bounds["y"]  # float32 quality where the adapters are float32


def test_kernels_under_the_interpreter(again: Again) -> None:
    code, report = again("--backend", "triton", "--steps", "2", "--target-modules", "v_proj", "--no-check")
    assert report["environment"]["backend"] == "triton"
    assert code in (0, 1)  # two steps need not be enough to learn
    assert report["curve_distance"] <= 2e-6 * max(report["outcomes"]["eager"]["losses"])


def changed_layer(change: Callable[..., dict[str, Any]]) -> type[FusedLoraLinear]:
    """A layer that, in training, computes the reference with the arguments that `change` makes of the right ones."""

    class ChangedLayer(FusedLoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            right = {name: getattr(self, name) for name in ("weight", "lora_A", "lora_B", "bias", "scaling")}
            right["dropout_p"] = self.lora_dropout
            right["keep_mask"] = dropout_mask(draw_seed(x.device), x[..., 0].numel(), x.shape[-1], self.lora_dropout)
            return reference.lora_linear(x, **right | change(**right))

    return ChangedLayer


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor + (tensor * (1 - factor)).detach()


@pytest.mark.parametrize(
    ("change", "layers_pass", "curves_pass"),
    [
        pytest.param(lambda **_: {}, True, True, id="right"),
        pytest.param(lambda scaling, **_: {"scaling": scaling * 1.001}, False, False, id="scaling off by 0.1 %"),
        pytest.param(lambda keep_mask, **_: {"keep_mask": keep_mask.roll(1, 0)}, False, False, id="mask shifted by a row"),
        pytest.param(lambda lora_B, **_: {"lora_B": lora_B.detach() + 0 * lora_B}, False, False, id="zero gradient of B"),
        # Adam divides a wrong scale of a gradient out again: only the layers can show it.
        pytest.param(
            lambda lora_A, dropout_p, **_: {"lora_A": scaled_gradient(lora_A, 1 / keep_scale(dropout_p))},
            False,
            True,
            id="dropout scale missing in dA",
        ),
    ],
)
def test_a_wrong_layer_fails(
    again: Again, monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, Any]], layers_pass: bool, curves_pass: bool
) -> None:
    monkeypatch.setattr(train, "FusedLoraLinear", changed_layer(change))
    code, report = again()
    _, layers, curves = report["verdicts"]
    assert code == int(not layers_pass)
    assert layers["passed"] is layers_pass
    assert curves["passed"] is curves_pass
    assert (report["largest_difference"] == 0.0) is layers_pass


def test_a_layer_that_no_step_reaches_is_reported(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base = train.load_base

    def with_unused_branch(*args: Any) -> nn.Module:
        base = load_base(*args)
        base.add_module("unused", nn.Linear(8, 8))
        return base

    monkeypatch.setattr(train, "load_base", with_unused_branch)
    code, report = again("--steps", "20")
    assert code == 0
    assert report["control"]["unreached"] == ["unused"]
    assert "unused" not in {row["layer"] for row in report["control"]["layers"]}
    assert "not reached: unused" in report["verdicts"][1]["figures"]


def test_not_learning_fails(again: Again, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = again("--lr", "1e-12", "--no-check", "--steps", "3")
    assert code == 1
    assert [verdict["passed"] for verdict in report["verdicts"]] == [False, None, None]
    out = capsys.readouterr().out
    assert "FAILED  held-out loss fell" in out
    assert "not checked  curves" in out


def test_diverging_fails_and_is_still_reported(again: Again) -> None:
    code, report = again("--lr", "1e30", "--steps", "5")
    assert code == 1
    assert report["outcomes"]["fused"]["after"] is None  # NaN, which JSON cannot hold
    assert not report["passed"]


def test_json_is_all_there_is(again: Again, capfd: pytest.CaptureFixture[str]) -> None:
    _, report = again("--json", "--no-check", "--steps", "2")
    out, err = capfd.readouterr()
    assert json.loads(out) == report
    assert err == ""


def test_the_models_own_tokenizer_is_used(again: Again, text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **shape)).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    options = ["--no-check", "--steps", "2"]
    by_bytes = again(*options)[1]["tokens"]["adapt"]
    assert again(*options, "--model", str(tmp_path / "model"))[1]["tokens"]["adapt"] < by_bytes  # merged pairs of bytes
    assert not (tmp_path / "base").exists()


@pytest.fixture(autouse=True, scope="module")
def _keep_threads() -> Any:
    """The command sets torch's threads for its process, which the tests share."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
