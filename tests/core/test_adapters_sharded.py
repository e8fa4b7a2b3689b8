"""Adapter files of models that two processes share: FSDP2 is saved and loaded, what is not whole is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fastlora import inject, save_adapter

WORKER = Path(__file__).parents[1] / "helpers" / "sharded.py"


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    """What each of the two processes found."""
    done = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    return [first, second]


@pytest.mark.parametrize("way", ["float32", "bfloat16 base", "mixed precision"])
def test_one_process_and_a_sharded_model_load_what_was_trained(way: str, outcomes: list[dict[str, Any]]) -> None:
    assert [outcome[way] for outcome in outcomes] == [True, True]


def test_an_error_of_rank_0_reaches_the_others(outcomes: list[dict[str, Any]]) -> None:
    first, second = (outcome["save into a file"] for outcome in outcomes)
    assert first.startswith("FileExistsError")
    assert second.startswith("RuntimeError: rank 0 could not write the adapter: FileExistsError")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("load nothing", "FileNotFoundError"),
        ("inject", "ValueError: 'first.up.weight' is sharded, which new parameters would not be: inject before fully_shard"),
        ("save from a part", "ValueError: the model is sharded over DeviceMesh"),
        ("save parts", "ValueError: lora_A of 'first.up' has shape "),
        ("inject parts", "ValueError: model holds a FullyShardedDataParallel, which would not reduce new parameters"),
    ],
)
def test_refused(case: str, message: str, outcomes: list[dict[str, Any]]) -> None:
    assert all(outcome[case].startswith(message) for outcome in outcomes)


def test_of_fsdp_s_first_version_the_whole_parameters_are_saved(outcomes: list[dict[str, Any]]) -> None:
    assert all("in summon_full_params or GatheredParameters" in outcome["save parts"] for outcome in outcomes)
    assert [outcome["save the whole"] for outcome in outcomes] == [True, True]


def test_the_config_names_the_class_of_the_model_itself(tmp_path: Path) -> None:
    """fully_shard gives the model a class FSDP<name>, which nobody can import."""
    model = inject(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    wrapper = {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"}
    model.__class__ = type("FSDPSequential", (nn.Sequential,), wrapper)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}
