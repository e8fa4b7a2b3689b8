"""Two processes on a CPU train an accelerated model on halves of a batch; a script that test_data_parallel.py runs.

For each way it prints a line of JSON: the fallbacks, and the errors of the averaged gradients of two steps against a
float64 model that sees the whole batch, with PEFT's own on the whole batch beside them.
"""

import copy
import json
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import PeftModel
from peft_models import build, inputs_of, wrap
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import torch_backend

#: What `save_pretrained` needs of a sharded model: the whole of what is trained, on rank 0.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
RANKS = 2
STEPS = 2


def prepared(dtype: torch.dtype) -> nn.Module:
    """A tiny Llama in `dtype` with float32 adapters."""
    return wrap(build("llama", dtype))


def gradients(model: nn.Module, ids: Tensor, parts: int, trained: nn.Module) -> Tensor:
    """The adapters' gradients of STEPS steps, as one vector; the loss is the mean over `parts` parts of the batch.

    `trained` holds the parameters, and may be wrapped by `model`.
    """
    named = [parameter for name, parameter in trained.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(named, lr=0.1)
    found = []
    for _ in range(STEPS):
        for part in ids.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()
        found += [whole(parameter.grad).double().flatten() for parameter in named]
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(found)


def whole(tensor: Any) -> Tensor:
    """A sharded tensor in full."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model: Any) -> nn.Module:
    """FSDP2, a unit for each decoder layer."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


#: How the model is distributed, the dtype of its base, and whether its MLPs run as one step.
WAYS = {
    "DDP": (DistributedDataParallel, torch.float32, False),
    "DDP, MLPs as one step": (DistributedDataParallel, torch.float32, True),
    "FSDP2": (shard, torch.float32, False),
    "FSDP2, MLPs as one step": (shard, torch.float32, True),
    "FSDP2 on a bfloat16 base": (shard, torch.bfloat16, True),
}


def train(rank: int, way: str, meeting: str) -> None:
    """One process; the first one prints.  The processes meet in the file `meeting`, which is not there yet."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    distribute, dtype, mlp = WAYS[way]
    ids = inputs_of(batch=2 * RANKS)["input_ids"]
    model = prepared(dtype)
    late = distribute(copy.deepcopy(model)) if distribute is shard else None
    report = fastlora.accelerate(model, mlp=mlp)
    with mock.patch("fastlora.peft.mlp.lora_mlp", wraps=fastlora.lora_mlp) as steps:
        result = gradients(distribute(model), ids.chunk(RANKS)[rank], 1, model)
    state = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        model.save_pretrained(f"{meeting} saved", state_dict=state)
        loaded = PeftModel.from_pretrained(build("llama", dtype), f"{meeting} saved").state_dict()
        truth, eager = (gradients(m, ids, RANKS, m) for m in (prepared(dtype).double(), prepared(dtype)))
        outcome = {
            "way": way,
            "taken": len(report.taken),
            "mlps": steps.call_count,
            "fallbacks": fastlora.peft.fallbacks(model),
            "error": ((result - truth).norm() / truth.norm()).item(),
            "eager": ((eager - truth).norm() / truth.norm()).item(),
            "saved": all(torch.equal(loaded[name], tensor) for name, tensor in state.items()) and len(state),
            "late": str(fastlora.accelerate(late)) if late else None,
        }
        print(json.dumps(outcome), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch_backend.BREAK_EVEN = 0  # the model is small
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            # Forked, so that what takes longest, the imports, is done once.
            torch.multiprocessing.start_processes(train, (way, f"{folder}/{way}"), RANKS, start_method="fork")
