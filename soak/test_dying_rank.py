"""A rank that dies while two save a model that FSDP2 has sharded: the other one ends, and the folder holds the old adapter or
the new one."""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastlora import from_pretrained, inject, save_adapter
from fastlora.adapters import sharded

pytestmark = pytest.mark.usefixtures("torch_backend")
RANKS, PATIENCE = 2, 60.0  # processes; seconds until a rank that waits for a dead one counts as hanging
#: Where a rank dies: (what is replaced, at which of its calls).
POINTS: dict[str, tuple[Any, str, int]] = {
    "before gathering": (DTensor, "full_tensor", 0),
    "between two tensors": (DTensor, "full_tensor", 1),
    "after gathering": (sharded, "on_first_rank", 0),
    "before the first file": (os, "fsync", 0),
    "before the second file": (os, "fsync", 1),
    "before the tensors are replaced": (os, "replace", 0),
    "between the replacements": (os, "replace", 1),
}
CASES = [(rank, point) for point in POINTS for rank in range(RANKS) if rank == 0 or POINTS[point][0] is not os]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))


def adapter(seed: int) -> nn.Module:
    model = inject(network(), target_modules=["0", "2"], r=2)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()


def dying(real: Callable[..., Any], call: int) -> Callable[..., Any]:
    def replacement(*arguments: Any, **options: Any) -> Any:
        nonlocal call
        if call == 0:
            os._exit(9)
        call -= 1
        return real(*arguments, **options)

    return replacement


def save(rank: int, store: str, folder: Path, point: str | None) -> None:
    """What a rank does in a process of its own; with a point it dies there."""
    code = 1
    try:
        options: dict[str, Any] = {"timeout": timedelta(seconds=PATIENCE / 2), "rank": rank, "world_size": RANKS}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
        model = fully_shard(adapter(2))
        if point:
            owner, name, call = POINTS[point]
            mock.patch.object(owner, name, dying(getattr(owner, name), call)).start()
        save_adapter(model, folder)
        code = 0
    except RuntimeError as error:
        print(f"rank {rank}: {str(error)[:100]}", end=" ", flush=True)
        code = 3
    finally:
        os._exit(code)


def ended(children: list[int]) -> list[int | None]:
    """The exit codes of the children; None for one that hangs, which is killed."""
    deadline, codes = time.monotonic() + PATIENCE, {}
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.05)
    for child in children:
        if child not in codes:
            os.kill(child, 9)
            os.waitpid(child, 0)
    return [codes.get(child) for child in children]


@pytest.mark.parametrize(("dead", "point"), [(None, None), *CASES])
def test_a_rank_that_dies(dead: int | None, point: str | None, tmp_path: Path) -> None:
    old, new, x = adapter(1), adapter(2), torch.randn(7, 5)
    folder = tmp_path / "adapter"
    save_adapter(old, folder)
    with tempfile.TemporaryDirectory() as store:
        children = []
        for rank in range(RANKS):
            if not (child := os.fork()):
                save(rank, f"{store}/store", folder, point if rank == dead else None)
            children.append(child)
        codes = ended(children)
    y = from_pretrained(network(), folder)(x)
    found = [name for name, model in (("old", old), ("new", new)) if torch.equal(model(x), y)]
    print(f"\nrank {dead} dies {point or 'nowhere'}: exit codes {codes}, the folder holds the {found} adapter", end="")
    assert found in (["old"], ["new"])
    if dead is None:
        assert codes == [0] * RANKS
        assert found == ["new"]
    else:
        assert codes[dead] == 9
        assert codes[1 - dead] in (0, 3)
