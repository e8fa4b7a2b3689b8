"""Two processes on a CPU train, save and load a sharded model; a script that test_adapters_sharded.py runs.

The first one prints a line of JSON: what each has found.
"""

import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from fastlora import from_pretrained, inject, load_adapter, save_adapter

RANKS = 2
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks and a head; no two processes can share the 13 rows evenly."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(OrderedDict(up=nn.Linear(8, 13), act=nn.ReLU(), down=nn.Linear(13, 8))) for _ in range(2)]
    return nn.Sequential(OrderedDict(first=blocks[0], second=blocks[1], head=nn.Linear(8, 3))).to(dtype)


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Adapters in float32, and where all is, biases and the head: what a unit of FSDP trains must have one dtype."""
    more: dict[str, Any] = {"modules_to_save": ["head"], "bias": "lora_only"} if dtype == torch.float32 else {}
    return inject(build(dtype), target_modules=["up", "down"], r=3, adapter_dtype=torch.float32, **more)


def shard(model: Any, **options: Any) -> Any:
    """The first block is a unit of its own; the rest, which stays whole after a forward, is the root's."""
    fully_shard(model.first, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, rank: int, dtype: torch.dtype) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(X.to(dtype).chunk(RANKS)[rank]).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same_outputs(rank: int, folder: Path, dtype: torch.dtype, **options: Any) -> bool:
    """The sharded model, the model that one process loads and a sharded model that loads compute the same."""
    model, x = shard(adapted(dtype), **options), X.to(dtype)
    train(model, rank, dtype)
    with torch.no_grad():
        y = model(x)  # which leaves the root's parameters whole
    save_adapter(model, folder)
    other = shard(adapted(dtype), **options)
    with torch.no_grad():
        before = other(x)
        load_adapter(other, folder)
        other.reshard()  # from the whole parameters that the forward has left to the shards
        plain = from_pretrained(build(dtype), folder, adapter_dtype=torch.float32)
        if "mp_policy" in options:
            plain.to(y.dtype)
        return not torch.equal(before, y) and torch.equal(other(x), y) and torch.equal(plain(x.to(y.dtype)), y)


def message_of(call: Callable[..., Any], *arguments: Any) -> str:
    try:
        call(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def saves_the_whole(model: nn.Module, folder: Path) -> bool:
    """What rank 0 saves of a model of FSDP's first version, while its parameters are whole, is right."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        if dist.get_rank() == 0:
            save_adapter(model, folder)
    dist.barrier()
    return torch.equal(from_pretrained(build(), folder)(X), adapted()(X))


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(adapted())
    (folder / "file").touch()
    alone = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("apart", "alone"))["alone"]
    parts = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    outcome = {
        "float32": same_outputs(rank, folder / "float32", torch.float32),
        "bfloat16 base": same_outputs(rank, folder / "bfloat16", torch.bfloat16),
        "mixed precision": same_outputs(rank, folder / "mixed", torch.float32, mp_policy=half),
        "save into a file": message_of(save_adapter, model, folder / "file"),
        "load nothing": message_of(load_adapter, model, folder / "nothing"),
        "save from a part": message_of(save_adapter, shard(adapted(), mesh=alone), folder / "part"),
        "inject": message_of(lambda: inject(shard(build()), target_modules=["up"])),
        "save parts": message_of(save_adapter, parts, folder / "parts"),
        "inject parts": message_of(lambda: inject(parts, target_modules=["up"])),
        "save the whole": saves_the_whole(parts, folder / "parts"),
    }
    outcomes = [outcome] * RANKS
    dist.all_gather_object(outcomes, outcome)
    if rank == 0:
        print(json.dumps(outcomes), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        # Forked, so that what takes longest, the imports, is done once.
        torch.multiprocessing.start_processes(work, (Path(name),), RANKS, start_method="fork")
