"""Every script of examples/ runs at a small size; each asserts itself that its loss falls and its LoRA layers are fused."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastlora
from fastlora.autograd import LoraLinearFunction
from fastlora.blocks.group import LoraLinearsFunction
from fastlora.peft import fused

EXAMPLES = Path(__file__).parents[2] / "examples"

#: script -> number of LoRA layers in its model.
WITH_PEFT = {"llama_peft.py": 4, "qlora.py": 14, "hf_trainer.py": 14, "trl_sft.py": 14}
WITHOUT_PEFT = {"roberta_inject.py": 4, "loralib_merge.py": 1}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(script, arguments) -> what it prints; in this process, because importing transformers again takes longer."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        runpy.run_path(str(EXAMPLES / script))["main"](arguments)
        return capsys.readouterr().out

    with mock.patch.dict(os.environ):  # the Trainer sets variables for the whole process
        yield run


def test_all_scripts_are_run_here():
    elsewhere = {"sentiment.py", "qa.py", "three_ways.py"}  # tests/cli/test_recipes.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*WITH_PEFT, *WITHOUT_PEFT, "fsdp2.py", "offline.py", *elsewhere}


@pytest.mark.parametrize(("script", "count"), (WITH_PEFT | WITHOUT_PEFT).items())
def test_runs(script, count, run):
    alone = mock.patch.object(LoraLinearFunction, "apply", side_effect=LoraLinearFunction.apply)
    together = mock.patch.object(LoraLinearsFunction, "apply", side_effect=LoraLinearsFunction.apply)
    with alone as single, together as shared:
        printed = run(script, "--steps", "12")
    assert re.search(r"^loss \d\.\d+ -> \d\.\d+ in 12 steps$", printed, re.MULTILINE)
    assert single.call_count + sum(len(call.args[2].words) for call in shared.call_args_list) >= 12 * count
    if script in WITH_PEFT:
        assert f"fastlora: {count} of {count} LoRA layers accelerated" in printed


def test_a_distributed_run_goes_on_where_another_has_saved(run, monkeypatch):
    """In one process, the way of torchrun; tests/core/test_adapters_sharded.py has two."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    printed = [run("fsdp2.py", "--steps", "12", *more) for more in (("--output", "half"), ("--way", "ddp", "--resume", "half"))]
    first, second = (re.search(r"^loss (\S+) -> (\S+) in 12 steps$", text, re.MULTILINE).groups() for text in printed)
    assert float(second[0]) < float(first[1])


FAULTS = {
    "no layer is taken": (fastlora, "accelerate", lambda model: fastlora.peft.Report((), (), ())),
    "a call falls back": (fused, "decide", lambda *args: "by this test"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("script", WITH_PEFT)
def test_fails_where(fault, script, run, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        run(script, "--steps", "1")


def test_a_loss_that_does_not_fall_is_an_error():
    check = runpy.run_path(str(EXAMPLES / "offline.py"))["check_that_it_falls"]
    check([2.0, 9.0, 0.0, 1.0])
    for losses in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, float("nan")]):
        with pytest.raises(SystemExit, match="did not fall"):
            check(losses)


def test_roberta_base_has_the_published_counts(run, tmp_path):
    printed = run("roberta_inject.py", "--size", "base", "--steps", "0", "--output", "adapter")
    assert "encoder: 416,256 trainable parameters of 124,647,170 in all, 0.33 %" in printed
    assert "adapter file: 1.7 MB" in printed
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 416_256
    head = {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    assert set(load_file(tmp_path / "adapter/head.safetensors")) == head


@pytest.mark.parametrize("script", ["llama_peft.py", "hf_trainer.py"])
def test_what_is_saved_is_peft_s(script, run, tmp_path):
    base = runpy.run_path(str(EXAMPLES / "offline.py"))["checkpoint"]("llama")
    run(script, "--steps", "1", "--model", base, "--output", "adapter")
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert {bool(torch.count_nonzero(tensor)) for name, tensor in loaded.named_parameters() if "lora_B" in name} == {True}


def test_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, EXAMPLES / "loralib_merge.py", "--steps", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert "merged on eval(), restored bit for bit on train()" in done.stdout
