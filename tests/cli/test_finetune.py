"""fastlora finetune: it learns, it reports what happened, and its verdicts find what is wrong."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import dropout_mask, modules, reference
from fastlora.cli import main
from fastlora.dropout import draw_seed
from fastlora.modules import FusedLoraLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from fastlora.finetune import data, train  # noqa: E402  # needs transformers

SMALL = ["--hidden-size", "32", "--layers", "1", "--seq-len", "32", "--batch-size", "4", "--r", "4", "--threads", "1"]

Again = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few thousand characters of Python's own prose: enough to adapt to, quick to evaluate on."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "debugger.txt"
    path.write_text(topics["debugger"][:12000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """The output of one whole small run.  The command sets torch's threads for its process, which the tests share."""
    threads, output = torch.get_num_threads(), tmp_path_factory.mktemp("run") / "output"
    training = ["--pretrain-steps", "200", "--pretrain-lr", "4e-3", "--steps", "40"]
    assert main(["finetune", *SMALL, *training, "--text", str(text), "--output", str(output)]) == 0
    yield output
    torch.set_num_threads(threads)


@pytest.fixture
def again(finished, text, tmp_path):
    """Another run on the base model of `finished`: exit code and report."""

    def run(*options):
        arguments = ["--model", str(finished / "base"), "--text", str(text), *SMALL, "--output", str(tmp_path), "--steps", "40"]
        code = main(["finetune", *arguments, *options])
        return code, json.loads((tmp_path / "report.json").read_text())

    return run


def test_whole_run(finished):
    assert {path.name for path in finished.iterdir()} == {"adapter", "base", "loss.png", "report.json"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert [verdict["passed"] for verdict in report["verdicts"]] == [True] * 3
    for outcome in report["outcomes"].values():
        assert outcome["gain"] == pytest.approx(outcome["before"] - outcome["after"])
        assert outcome["gain"] > 2 * outcome["gain_error"] > 0
        assert outcome["step_seconds"] > 0
    fused, eager = report["outcomes"]["fused"], report["outcomes"]["eager"]
    assert fused["saved_bytes"] < eager["saved_bytes"]
    differences = [abs(a - b) for a, b in zip(fused["losses"], eager["losses"], strict=True)]
    assert len(differences) == 40
    assert report["largest_difference"] == max(differences)
    assert 0 < report["curve_distance"] <= max(differences)
    assert [row["output"] for row in report["control"]["layers"]] == 7 * ["y", "dx", "dA", "dB"]
    assert report["control"]["unreached"] == []
    assert {"cores", "threads", "backend", "torch", "device"} <= set(report["environment"])


def test_peft_reproduces_the_reported_loss(finished, text):
    """Base and adapter, as written, are the model that was measured."""
    report = json.loads((finished / "report.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(finished / "base")
    assert sum(p.numel() for p in base.parameters()) == report["parameters"] - report["trainable"]
    held_out = data.tokenize_corpus(data.load_corpus([text]), str.encode, 32)["held_out"]

    @torch.no_grad()
    def loss(model):
        return float(model(input_ids=held_out, labels=held_out).loss)

    before, after = loss(base), loss(peft.PeftModel.from_pretrained(base, finished / "adapter"))
    fused = report["outcomes"]["fused"]
    assert (before, after) == pytest.approx((fused["before"], fused["after"]), rel=1e-5)  # two orders below the gain
    assert before - after > 1e-3 * before


def test_equal_settings_give_equal_runs(again):
    first, second, other = (again("--no-check", "--steps", "5", "--seed", seed)[1]["outcomes"] for seed in "001")
    assert [o["losses"] for o in first.values()] == [o["losses"] for o in second.values()]
    assert other["fused"]["losses"] != first["fused"]["losses"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], [r".*\.(q|v)_proj"]])
def test_bfloat16_with_float32_adapters(again, targets):
    code, report = again("--dtype", "bfloat16", "--target-modules", *targets)
    assert code == 0
    assert report["trainable"] == 2 * 2 * 32 * 4
    bounds = {row["output"]: row["bound"] for row in report["control"]["layers"]}
    assert bounds["dA"] < 1e-3 < bounds["y"]  # float32 quality where the adapters are float32


def test_kernels_under_the_interpreter(again, monkeypatch):
    backends = set()
    lora_linear = modules.lora_linear
    monkeypatch.setattr(modules, "lora_linear", lambda *a, **k: backends.add(k["backend"]) or lora_linear(*a, **k))
    _, report = again("--backend", "triton", "--steps", "2", "--target-modules", "v_proj", "--no-check")
    assert backends == {report["environment"]["backend"]} == {"triton"}
    assert report["curve_distance"] <= 2e-6 * max(report["outcomes"]["eager"]["losses"])


def changed_layer(change):
    """A layer that, in training, computes the reference with the arguments that `change` makes of the right ones."""

    class ChangedLayer(FusedLoraLinear):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            right = {name: getattr(self, name) for name in ("weight", "lora_A", "lora_B", "bias", "scaling")}
            right["dropout_p"] = self.lora_dropout
            right["keep_mask"] = dropout_mask(draw_seed(x.device), x[..., 0].numel(), x.shape[-1], self.lora_dropout)
            return reference.lora_linear(x, **right | change(**right))

    return ChangedLayer


def with_gradient_scaled(tensor, factor):
    return tensor * factor + (tensor * (1 - factor)).detach()


@pytest.mark.parametrize(
    ("change", "layers_pass", "curves_pass"),
    [
        pytest.param(lambda **_: {}, True, True, id="right"),
        pytest.param(lambda scaling, **_: {"scaling": scaling * 1.001}, False, False, id="scaling off by 0.1 %"),
        pytest.param(lambda keep_mask, **_: {"keep_mask": keep_mask.roll(1, 0)}, False, False, id="mask shifted by a row"),
        pytest.param(lambda lora_B, **_: {"lora_B": with_gradient_scaled(lora_B, 0.0)}, False, False, id="zero gradient of B"),
        # Adam divides a wrong scale of a gradient out again: only the layers can show it.
        pytest.param(lambda lora_A, **_: {"lora_A": with_gradient_scaled(lora_A, 0.9)}, False, True, id="dA without its scale"),
    ],
)
def test_a_wrong_layer_fails(again, monkeypatch, change, layers_pass, curves_pass):
    monkeypatch.setattr(train, "FusedLoraLinear", changed_layer(change))
    code, report = again()
    assert code == int(not layers_pass)
    assert [verdict["passed"] for verdict in report["verdicts"][1:]] == [layers_pass, curves_pass]
    assert (report["largest_difference"] == 0.0) is layers_pass


def test_layers_that_no_loss_reaches_are_reported(again, monkeypatch):
    load_base = train.load_base

    def add_branches(model, args, output):
        model.unread(torch.ones(8))
        output.logits = output.logits + model.model.layers[0].self_attn.q_proj(torch.ones(32)).sum()  # a second call

    def with_unused_branches(*args):
        base, tokenize = load_base(*args)
        base.uncalled, base.unread = nn.Linear(8, 8), nn.Linear(8, 8)
        base.register_forward_hook(add_branches)
        return base, tokenize

    monkeypatch.setattr(train, "load_base", with_unused_branches)
    code, report = again("--steps", "20")
    assert code == 0
    assert report["control"]["unreached"] == ["uncalled", "unread"]
    assert "not reached: uncalled, unread" in report["verdicts"][1]["figures"]


@pytest.mark.parametrize(
    ("options", "verdicts", "shown"),
    [
        ("--lr 1e-12 --steps 3 --no-check", [False, None, None], "not checked  curves"),
        ("--lr 1e30 --steps 5", [False, False, False], "FAILED  curves"),
    ],
)
def test_not_learning_fails_and_is_still_reported(options, verdicts, shown, again, capsys):
    code, report = again(*options.split())
    assert (code, report["passed"]) == (1, False)
    assert [verdict["passed"] for verdict in report["verdicts"]] == verdicts
    assert (report["outcomes"]["fused"]["after"] is None) == ("1e30" in options)  # NaN, which JSON cannot hold
    out = capsys.readouterr().out
    assert "FAILED  held-out loss fell" in out
    assert shown in out


def test_json_is_all_there_is(again, capfd):
    _, report = again("--json", "--no-check", "--steps", "2")
    out, err = capfd.readouterr()
    assert json.loads(out) == report
    assert err == ""


def test_the_models_own_tokenizer_is_used(again, finished, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "the": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    shutil.copytree(finished / "base", tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    options = ["--no-check", "--steps", "2"]
    by_bytes = again(*options)[1]["tokens"]["adapt"]
    assert again(*options, "--model", str(tmp_path / "model"))[1]["tokens"]["adapt"] < by_bytes / 3  # words
    assert not (tmp_path / "base").exists()
