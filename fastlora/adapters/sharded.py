"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: whole tensors out of their shards, and back.

A sharded parameter is a DTensor.  Gathering is collective: every process of the model's mesh takes part, in the same order.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from fastlora.injection.walk import is_sharded


def reshard(model: nn.Module) -> None:
    """Give the units of `model` their shards back: between forward and backward they hold plain tensors, which FSDP drops."""
    for module in model.modules():
        if callable(free := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
            free()


def gather(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """`tensors` on the CPU, none tied to another, and whether one is sharded.  Where one is, only rank 0 gets them.

    Raises ValueError for a mesh that lacks some of the processes: those could not take part.
    """
    sharded = [tensor.device_mesh for tensor in tensors.values() if is_sharded(tensor)]
    if any(mesh.size() != dist.get_world_size() for mesh in sharded):
        raise ValueError(f"the model is sharded over {sharded[0]}, expected a mesh of all {dist.get_world_size()} processes")
    kept = {}
    for key, tensor in tensors.items():
        whole = tensor.detach()
        if is_sharded(whole):  # with CPU offloading the shards are where the mesh's processes cannot exchange them
            whole = whole.to(whole.device_mesh.device_type).full_tensor()
        if not sharded or dist.get_rank() == 0:
            kept[key] = whole.to("cpu", copy=True).contiguous()
    return kept, bool(sharded)


def on_first_rank(write: Callable[[], None]) -> None:
    """Call `write` on rank 0 while the others wait for it.  Raises its error there and a RuntimeError elsewhere."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except BaseException as error:
            failure = [repr(error)]
            raise
        finally:
            dist.broadcast_object_list(failure, src=0)
        return
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise RuntimeError(f"rank 0 could not write the adapter: {failure[0]}")


def like(tensor: Tensor, into: Tensor) -> Tensor:
    """`tensor`, sharded as `into` is.  Every process cuts its own shard out of the whole: nothing is sent."""
    if not is_sharded(into):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, into.device_mesh, into.placements, src_data_rank=None)
