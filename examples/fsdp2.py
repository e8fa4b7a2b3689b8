"""Train float32 adapters on a bfloat16 base in several processes, with DDP or FSDP2; save, and go on from what was saved.

torchrun --nproc-per-node 2 examples/fsdp2.py               # FSDP2; two processes on a CPU, or two GPUs
torchrun --nproc-per-node 2 examples/fsdp2.py --way ddp     # every process holds the whole model
torchrun --nproc-per-node 2 examples/fsdp2.py --output adapter
torchrun --nproc-per-node 2 examples/fsdp2.py --resume adapter
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from offline import check_that_it_falls
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastlora

VOCABULARY, WIDTH, LENGTH = 32, 64, 16


class Block(nn.Module):
    """Attention and an MLP; the unit that FSDP2 gathers, computes with and frees."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,))).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Model(nn.Module):
    """A small language model with random weights.  Put your own in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def build(device: torch.device) -> Model:
    """The frozen base in bfloat16, with float32 adapters on every linear of the blocks; the same in every process."""
    torch.manual_seed(0)
    model = Model().to(device, torch.bfloat16)
    fastlora.inject(model, target_modules=["qkv", "out", "up", "down"], r=8, lora_alpha=16, adapter_dtype=torch.float32)
    return model


def distribute(model: Model, way: str) -> nn.Module:
    """The model that trains.  It has its adapters already: parameters that come later are not averaged or not sharded."""
    if way == "ddp":
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # param_dtype=torch.bfloat16 would round the adapters too
    for block in model.blocks:  # whole blocks: a unit for every linear would gather many small tensors
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=["fsdp2", "ddp"], default="fsdp2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, help="folder for the adapter and the state of the optimizer")
    parser.add_argument("--resume", type=Path, help="the --output of an earlier run to go on from, of either way")
    args = parser.parse_args(argv)

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = dist.get_rank()
    device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)

    model = distribute(build(device), args.way)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if args.resume:  # every process reads the files and takes its shards of them
        fastlora.load_adapter(model, args.resume)
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=args.resume / "optimizer")
        set_optimizer_state_dict(model, optimizer, state)

    # A task for random weights: go on counting.  Every process has its own part of the batch.
    draw = torch.Generator().manual_seed(rank)
    starts, strides = torch.randint(VOCABULARY, (2, 32, 1), generator=draw)
    ids = ((starts + (1 + strides % 3) * torch.arange(LENGTH)) % VOCABULARY).to(device)
    losses = []
    for _ in range(args.steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    if args.output:
        fastlora.save_adapter(model, args.output)  # FSDP2: every process calls it, and rank 0 writes
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=args.output / "optimizer")
    dist.destroy_process_group()
    if rank == 0:
        check_that_it_falls(losses)


if __name__ == "__main__":
    main()
