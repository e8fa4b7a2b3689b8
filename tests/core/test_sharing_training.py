"""Layers that share x under activation checkpointing and data parallelism: the same numbers as alone, and the same masks."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from siblings import assert_close, gradients, learned, model_of, x_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastlora.blocks import sharing


class Recorded(nn.Module):
    """The siblings in regions of activation checkpointing, and what each call computed, in the order of the calls.

    `split`: q and k are in one region, v is in another one; otherwise all are in one, with the layer before them.
    """

    def __init__(self, model: Any, split: bool, **options: Any) -> None:
        super().__init__()
        self.model, self.split, self.options = model, split, options
        self.made: dict[tuple[str, int], list[Tensor]] = {}

    def call(self, x: Tensor, names: str, key: int) -> Tensor:
        total = torch.zeros(())
        for name in names:
            y = getattr(self.model, name)(x)
            self.made.setdefault((name, key), []).append(y.detach().clone())
            total = total + (torch.sin(y) if name == "q" else y).sum()  # after q nothing is saved: early stop skips k and v
        return total

    def forward(self, x: Tensor, key: int) -> Tensor:
        x = x.requires_grad_()

        def whole(x: Tensor) -> Tensor:
            return self.call(torch.tanh(self.model.first(x)), "qkv", key)

        if not self.split:
            return checkpoint(whole, x, **self.options)
        h = torch.tanh(self.model.first(x))
        return sum(checkpoint(self.call, h, names, key, **self.options) for names in ("qk", "v"))


@pytest.mark.parametrize("schedule", ["FB", "FFBB", "FFBFBB"])
@pytest.mark.parametrize("split", [False, True], ids=["one region", "two regions"])
@pytest.mark.parametrize(("reentrant", "early_stop"), [(True, True), (False, True), (False, False)])
def test_checkpointing_computes_again_what_it_computed(
    reentrant: bool, early_stop: bool, split: bool, schedule: str, grouped: list[int]
) -> None:
    """Masks too: a call that is grouped in forward and not in backward, or the other way round, would draw other ones."""
    recorded = Recorded(model := model_of(p=0.4), split, use_reentrant=reentrant)
    if split and reentrant:  # nothing is learned in regions that x comes into, so the group was active before
        for _ in range(2):
            model.siblings(x_of())
        grouped.clear()
    optimizer = torch.optim.SGD([p for p in recorded.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(5)
    keys, losses = iter(range(100)), deque[Tensor]()
    with set_checkpoint_early_stop(early_stop):
        for _ in range(3):
            for direction in schedule:
                if direction == "F":
                    losses.append(recorded(x_of(key := next(keys), cols=6), key))
                else:
                    losses.popleft().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, key), made in recorded.made.items():
        assert len(made) == 2 or (early_stop and not reentrant and len(made) == 1 and name != "q"), (name, key)
        assert all(torch.equal(again, made[0]) for again in made[1:]), (name, key)
    assert grouped == ([] if split and reentrant else [3 - split] * (2 * len(schedule)))


def test_a_result_that_cannot_be_fetched_ends_the_group(grouped: list[int]) -> None:
    model = learned()
    for step in range(3):
        x = x_of()
        model.q(x)
        model.k.scaling = model.v.scaling = float(step)
        model.k(x), model.v(x)
    assert grouped == [3]


def test_a_member_that_runs_again_without_its_leader_ends_the_group() -> None:
    """x requires no gradient, so that nothing says in forward that two regions share it."""
    model, x, other = learned(), x_of(), torch.ones((), requires_grad=True)
    model.siblings(x_of(2))
    ys = [
        checkpoint(lambda x, other, name=name: getattr(model, name)(x) * other, x, other, use_reentrant=True) for name in "qkv"
    ]
    sum(y.sum() for y in ys).backward()
    model.siblings(x)
    assert sharing.single_reason(model.q) == sharing.NOT_CALLED


def test_a_checkpoint_learns_without_an_optimizer(grouped: list[int]) -> None:
    """As in a benchmark: forward and backward, again and again."""
    recorded = Recorded(model_of(), False, use_reentrant=False)
    for step in range(3):
        recorded(x_of(step, cols=6), step).backward()
    assert grouped == [3] * 4


def test_a_second_backward_of_a_retained_graph(grouped: list[int]) -> None:
    found = []
    for groups in (True, False):
        model, x = learned(groups=groups), x_of().requires_grad_()
        loss = sum((y.square()).sum() for y in model.siblings(x))
        for retain in (True, False):
            loss.backward(retain_graph=retain)
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"x": x.grad})
    assert grouped == [3]
    assert_close(*found)


def test_a_result_that_no_loss_uses_has_no_gradient(grouped: list[int]) -> None:
    model, twin = learned(), learned(groups=False)
    ours, theirs = ([layers.q(x), layers.k(x), layers.v(x)][:2] for layers, x in ((model, x_of()), (twin, x_of())))
    assert_close(gradients(model, ours), gradients(twin, theirs))
    assert grouped == [3]


def test_forwards_that_never_run_again_hold_nothing_up_beyond_an_optimizer_step(grouped: list[int]) -> None:
    model = model_of()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        with torch.autograd.graph.save_on_cpu():  # to the layers it looks like checkpointing
            sum(y.sum() for y in [*model.siblings(x_of()), *model.siblings(x_of(2))]).backward()
        assert grouped == [3, 3] * step
        optimizer.step()


@pytest.fixture(scope="module")
def alone_in_a_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: DDP and FSDP2 do all that they do with many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Some(nn.Module):
    """The sum of the siblings that `names` says in each step, of which the loss uses those in `used`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, names: str, used: str) -> Tensor:
        h = torch.tanh(self.model.first(x))
        made = {name: getattr(self.model, name)(h) for name in names}
        return torch.stack([torch.sin(made[name]).sum() for name in used]).sum()


def steps_of(model: nn.Module, names: str, used: str) -> list[Tensor]:
    """The gradients of the third step, in which only `names` are called and only `used` used."""
    for step in range(3):
        model.zero_grad()
        model(x_of(step, cols=6), *(("qkv", "qkv") if step < 2 else (names, used))).backward()
    grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters() if "lora_" in name]
    return [torch.zeros(()) if grad is None else grad for grad in grads]


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize(("names", "used"), [("qkv", "qkv"), ("qkv", "qk"), ("qk", "qk"), ("qv", "q")])
def test_ddp_with_a_sibling_that_is_not_used(names: str, used: str, grouped: list[int]) -> None:
    ours, theirs = (Some(model_of(groups=groups)) for groups in (True, False))
    model = DistributedDataParallel(ours, find_unused_parameters=True)
    assert_close(steps_of(model, names, used), steps_of(theirs, names, used))
    assert_close([model(x_of(5, cols=6), "qkv", "qkv")], [theirs(x_of(5, cols=6), "qkv", "qkv")])  # the reduction has ended
    assert grouped == [3] * (3 if names == "qkv" else 2)


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("per_linear", [False, True])
def test_fsdp2_shares_within_a_unit(per_linear: bool, grouped: list[int]) -> None:
    ours, theirs = (Some(model_of(groups=groups)) for groups in (True, False))
    for unit in [ours.model.q, ours.model.k, ours.model.v] * per_linear:
        fully_shard(unit)
    assert_close(steps_of(fully_shard(ours), "qkv", "qkv"), steps_of(theirs, "qkv", "qkv"))
    assert grouped == ([] if per_linear else [3, 3])
