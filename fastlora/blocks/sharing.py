"""Layers that are called with the same x, one after the other, as one call of `lora_linears`.

q, k and v of an attention read one x, and so do gate and up of an MLP. No list of architectures says so: the layers notice it.

    learning    In its first training call a layer joins the layers that were called just before it with the same x: a group.
    active      From the next training step on, the first layer of a group, its leader, computes all members at once. The
                others fetch their results.
    single      A group with one layer, or one whose members were not all called with the leader's x. Each computes alone.

Nothing is assumed. A member fetches its result if x is the very tensor that the leader saw, at the same version, in the same
grad mode, autocast mode and region of activation checkpointing, and if the operands that it would use now are those that the
leader used: the same tensors at the same addresses and versions, the same scaling and rate. Otherwise it computes alone.

A group draws one seed in the leader's call, and member i takes mask i of it. A member that computes alone draws its own seed.
So what activation checkpointing runs again in backward must group as it did at first. A group therefore starts and ends between
training steps: when no forward that may run again is outstanding, or when the optimizer has changed the adapter.

The results wait in the group, one set a thread, until each is fetched. What is left is dropped at the leader's next call, in
evaluation too. A copy of a group, or a pickled one, is empty: its layers learn again. torch.compile traces every layer alone.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.blocks.group import MASKS_AT_ONCE
from fastlora.blocks.projections import Projection, lora_linears
from fastlora.quantized import QuantizedWeight
from fastlora.validation import autocast_dtype, is_altered, is_transformed

ALTERED = "it has hooks, or a forward of its own"
REMADE = "its adapter's tensors are no parameters, but made at each call"
SUBCLASS = "its weight is not a plain tensor"
UNLIKE = "its mode, sizes, dtypes, device or backend are not those of the layer that leads its group"
NOT_CALLED = "not every layer of its group was called with the same x"

LEARNING, ACTIVE, SINGLE = "learning", "active", "single"


class Moment(NamedTuple):
    """The circumstances of a call with x. x is held weakly: it lives at least as long as its caller uses it."""

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Moment":
        """The circumstances of a call with x at this moment."""
        region = _region()
        mode = torch.is_grad_enabled(), autocast_dtype(x.device), region and weakref.ref(region)
        memory = StorageWeakRef(x.untyped_storage()), x.data_ptr()
        return cls(weakref.ref(x), (x._version, x.requires_grad, *memory, *mode))

    def same(self, other: "Moment") -> bool:
        """Whether both calls have one x and the same circumstances."""
        x = self.x()
        return x is not None and x is other.x() and self.state == other.state


class Pending(NamedTuple):
    """What a leader computed: for each member that has not been called yet, by id, its stamp, y, and what the stamp is of."""

    moment: Moment
    results: dict[int, tuple[tuple[Any, ...], Tensor, Any]]  # the last keeps ids and addresses from being used again
    again: bool  # computed in backward, where checkpointing may stop before the members are called


class Group:
    """The layers that share x, in the order of their calls, and the results that wait for them. The first layer leads."""

    def __init__(self) -> None:
        self.state = LEARNING
        self.members: list[weakref.ref[Any]] = []
        self.refused: dict[int, str] = {}  # id of a member -> why the leader's last call left it out
        self.reason: str | None = None  # why the group ends, or ended
        self.outstanding = 0  # forwards that activation checkpointing may run again
        self.versions: list[int] | None = None  # of the leader's A and B, when `outstanding` was last looked at
        self._thread = threading.local()

    def __reduce__(self) -> tuple[type["Group"], tuple[()]]:
        return Group, ()

    @property
    def pending(self) -> Pending | None:
        """What waits in this thread."""
        return getattr(self._thread, "pending", None)

    @pending.setter
    def pending(self, pending: Pending | None) -> None:
        self._thread.pending = pending

    def layers(self) -> list[Any]:
        """The members that still exist."""
        return [layer for member in self.members if (layer := member()) is not None]


class _Last(threading.local):
    """The last call of a layer that was learning, in this thread."""

    group: Callable[[], Group | None]
    moment: Moment | None = None


_last = _Last()


def shared(layer: Any, x: Tensor, given: Projection) -> Tensor | None:
    """What `layer` computes of x with the operands `given`, as a member of its group; None if it is to compute alone.

    A layer has `training`, `backend`, `_fastlora_group`, which is None if it always computes alone, and `_projection(x)`: the
    operands of its call with x, or why it computes that in another way.
    """
    if torch.compiler.is_compiling():
        return None
    group: Group | None = layer._fastlora_group
    if group is None or group.state is SINGLE:
        return None
    left = drop(layer)
    if not layer.training or _alone(layer, x, given) is not None:
        return None
    members = group.layers()
    moment = Moment.of(x)
    if members[:1] == [layer]:
        return _lead(group, members, left, moment, x, given)
    if layer in members:
        return _fetch(layer, group, moment, given) if group.state is ACTIVE else None
    _learn(layer, moment, given)
    return None


def drop(layer: Any) -> Pending | None:
    """Discard and return the results that wait in the group led by `layer`."""
    group: Group | None = None if torch.compiler.is_compiling() else layer._fastlora_group
    if group is None or group.pending is None or group.layers()[:1] != [layer]:
        return None
    left, group.pending = group.pending, None
    return left


def _learn(layer: Any, moment: Moment, given: Projection) -> None:
    """Join the layers called just before with the same x, or be the first of a new group."""
    group = _last.group() if _last.moment is not None and _last.moment.same(moment) else None
    if group is None or group.state is not LEARNING or len(group.members) == MASKS_AT_ONCE:
        group = Group()
        _settled(group, given)
        group.outstanding = int(_may_run_again())
    group.members.append(weakref.ref(layer))
    layer._fastlora_group = group
    _last.group, _last.moment = weakref.ref(group), moment


def _lead(
    group: Group, members: list[Any], left: Pending | None, moment: Moment, x: Tensor, given: Projection
) -> Tensor | None:
    """Compute all members, if the group is active: it starts and ends here."""
    if left is not None and left.results and not left.again:
        group.reason = NOT_CALLED
    again = _in_backward()
    if again:
        group.outstanding = max(group.outstanding - 1, 0)
    else:
        if _settled(group, given):
            group.state = SINGLE if group.reason or len(group.members) == 1 else ACTIVE
        group.outstanding += _may_run_again()
    if group.state is not ACTIVE:
        return None
    leader, chosen = members[0], []
    group.refused = {}
    for member in members[1:]:
        operands = member._projection(x)
        reason = operands if isinstance(operands, str) else _left_out(member, x, operands, leader, given)
        if reason is None:
            chosen.append((member, operands, _stamp(member, operands)))
        else:
            group.refused[id(member)] = reason
    if not chosen:
        return None
    y, *others = lora_linears(x, [given, *(operands for _, operands, _ in chosen)], backend=leader.backend)
    group.pending = Pending(moment, {}, again)
    for (member, operands, stamp), other in zip(chosen, others, strict=True):
        group.pending.results[id(member)] = stamp, other, (operands, [t.untyped_storage() for t in _tensors(operands)])
    return y


def _fetch(layer: Any, group: Group, moment: Moment, given: Projection) -> Tensor | None:
    """What the leader has computed for `layer`, if all is as it was then."""
    pending = group.pending
    if pending is None:
        if _in_backward():
            group.reason = NOT_CALLED  # its leader is not in the region that runs again
        return None
    result = pending.results.pop(id(layer), None)
    if not pending.results:
        group.pending = None
    if result is None:
        return None
    if pending.moment.same(moment) and result[0] == _stamp(layer, given):
        return result[1]
    group.reason = NOT_CALLED
    return None


def _settled(group: Group, given: Projection) -> bool:
    """Whether no earlier forward of the group will run again: each one has, or the optimizer has changed the adapter."""
    versions = [t._version for t in given[1:3] if isinstance(t, Tensor)]
    if versions != group.versions:
        group.versions, group.outstanding = versions, 0
    return group.outstanding == 0


def _alone(layer: Any, x: Tensor, given: Projection) -> str | None:
    """Why the call is not shared, or None."""
    plain = Tensor, nn.Parameter
    if type(x) not in plain or is_transformed() or torch.jit.is_tracing():
        return "its x is not a plain tensor"
    region = _region()
    if region is not None and not type(region).__weakrefoffset__:
        return "its saved tensors are unpacked by an object without weak references"
    if x.is_inference() or any(t.is_inference() for t in _tensors(given)):
        return "its tensors are of inference mode, and have no versions"
    if x.requires_grad and _enters_region(x):
        return "its x comes into a reentrant checkpoint, and may go into another one"
    if is_altered(layer):
        return ALTERED
    if type(given.lora_A) is not nn.Parameter or type(given.lora_B) is not nn.Parameter:
        return REMADE
    frozen = [t for t in (given.weight, given.bias) if t is not None and not isinstance(t, QuantizedWeight)]
    return None if all(type(t) in plain for t in frozen) else SUBCLASS


def _left_out(layer: Any, x: Tensor, given: Projection, leader: Any, leads: Projection) -> str | None:
    """Why the leader's call does not compute the layer too, or None."""
    same = layer.training and layer.backend == leader.backend and given.weight.device == leads.weight.device
    same = same and [_kind(t) for t in given[:2]] == [_kind(t) for t in leads[:2]]
    return _alone(layer, x, given) if same else UNLIKE


def _kind(operand: Tensor | QuantizedWeight | None) -> tuple[int | None, torch.dtype | None]:
    """(in, dtype) of W or A; a packed W may be of any dtype."""
    return None if operand is None else operand.shape[1], getattr(operand, "dtype", None)


def _stamp(layer: Any, given: Projection) -> tuple[Any, ...]:
    """What changes with the operands. Only where a gradient flows does it matter which of two views of one memory is used."""
    stamps = [(id(t) if t.requires_grad else 0, t.data_ptr(), t._version) for t in _tensors(given)]
    return *stamps, given.scaling, given.dropout_p, layer.backend


def _tensors(given: Projection) -> list[Tensor]:
    weight, A, B, bias = given[:4]
    frozen = (weight.packed, *weight.statistics) if isinstance(weight, QuantizedWeight) else (weight,)
    return [t for t in (*frozen, A, B, bias) if t is not None]


def _region() -> Any:
    """What stands for the innermost region whose saved tensors are packed, as activation checkpointing does; None outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[1]


def _in_backward() -> bool:
    """Whether autograd runs backward in this thread: a forward in there is one that checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1


def _may_run_again() -> bool:
    """Whether the forward may be one of activation checkpointing, of either kind."""
    return not torch.is_grad_enabled() or _region() is not None


def _enters_region(x: Tensor) -> bool:
    """Whether x, which requires grad, comes into a region of reentrant checkpointing from outside.

    Such an x may be shared across regions, which run again one by one. In forward the region has no grad mode, and what it
    computes itself requires no grad. In backward its inputs are leaves.
    """
    return not torch.is_grad_enabled() or (x.is_leaf and _in_backward() and _region() is None)


def groups(layers: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The names of the layers of each group that shares x; `layers` are a model's by name."""
    named: dict[Group, list[str]] = {}
    for name, layer in layers.items():
        group = getattr(layer, "_fastlora_group", None)
        if group is not None and group.reason is None and len(group.members) > 1 and single_reason(layer) is None:
            named.setdefault(group, []).append(name)
    return tuple(tuple(names) for names in named.values() if len(names) > 1)


def single_reason(layer: Any) -> str | None:
    """Why the layer shares x with none, where another reason than its calls is known."""
    group: Group | None = getattr(layer, "_fastlora_group", None)
    if group is None:
        return None
    return ALTERED if is_altered(layer) else group.reason or group.refused.get(id(layer))
