"""What `fastlora tune --model` takes: shapes, a configuration's file or folder, a hub id."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tuned import refusal

from fastlora import cli, tune
from fastlora.cli.tune import shapes_of
from fastlora.kernels.target import Target

pytestmark = pytest.mark.usefixtures("empty_cache")


def saved(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder / "config.json"


LLAMA = transformers.LlamaConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def test_shapes_as_such() -> None:
    assert shapes_of("64x32") == [(64, 32)]
    assert shapes_of("64x32,32x64,64x32") == [(64, 32), (32, 64)]


def test_a_decoder_by_file_and_by_folder(tmp_path: Path) -> None:
    """(in, out) of q and o, k and v, gate and up, down; not of the output head, 64 x 50."""
    file = saved(LLAMA, tmp_path)
    assert shapes_of(str(file)) == shapes_of(str(tmp_path)) == [(64, 64), (64, 32), (64, 96), (96, 64)]


def test_conv1d_weights_are_stored_the_other_way_round(tmp_path: Path) -> None:
    saved(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2), tmp_path)
    assert shapes_of(str(tmp_path)) == [(32, 96), (32, 32), (32, 128), (128, 32)]


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    saved(transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2), tmp_path)
    assert shapes_of(str(tmp_path)) == [(32, 32), (32, 48), (48, 32)]


def test_a_model_is_tuned(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, row count, rank, direction, with and without dropout: once, with the options given."""
    asked: list[Any] = []
    monkeypatch.setattr(tune, "tune", lambda problems, device, **options: asked.append((problems, device, options)))
    model = str(saved(LLAMA, tmp_path))
    arguments = ["-r", "8", "32", "-p", "0.05", "0", "--dtype", "float16", "--adapter-dtype", "float32", "--repeats", "7"]
    assert cli.main(["tune", "--model", model, *arguments]) == 0
    ((problems, device, options),) = asked
    assert len(problems) == len(set(problems)) == 4 * 6 * 2 * 2 * 2
    assert {problem.rows for problem in problems} == {512, 1024, 2048, 4096, 8192, 16384}
    assert ({problem.r for problem in problems}, {problem.dtype for problem in problems}) == ({8, 32}, {torch.float16})
    assert (device, options["adapter_dtype"]) == (torch.device("cpu"), torch.float32)
    assert (options["dropout_p"], options["repeats"]) == (0.05, 7)


def test_a_hub_id_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def offline(model: str) -> None:
        asked.append(model)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    for model in ("Qwen/Qwen3-8B", "gpt2"):
        assert "couldn't connect" in refusal(capsys, "--model", model)
    assert asked == ["Qwen/Qwen3-8B", "gpt2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid JSON file"), ('{"model_type": "nope"}', "does not recognize"), ("{}", "model_type")],
)
def test_a_bad_configuration(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message in refusal(capsys, "--model", str(tmp_path))


def test_a_folder_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.json" in refusal(capsys, "--model", str(tmp_path))
