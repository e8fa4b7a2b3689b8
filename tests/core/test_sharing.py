"""Layers that share x as one call: what is fetched is what the layer would compute, whatever happens between two calls.

A model with groups and its twin without go through the same steps. Results are compared, and calls counted."""

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from siblings import FLOOR, Siblings, assert_close, gradients, learned, model_of, x_of
from torch import Tensor, nn

import fastlora
from fastlora import dropout_mask, inject, lora_linear, modules, oracle, reference
from fastlora.blocks import sharing
from fastlora.dropout import draw_seed

Step = Callable[[Any, Tensor], list[Tensor]]


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each call that a layer makes alone."""
    made: list[int] = []

    def counting(*tensors: Any, **options: Any) -> Any:
        made.append(1)
        return lora_linear(*tensors, **options)

    monkeypatch.setattr(modules, "lora_linear", counting)
    return made


def test_the_first_training_step_learns_and_the_next_one_shares(grouped: list[int], single: list[int]) -> None:
    model, twin = model_of(), model_of(groups=False)
    assert sharing.groups(dict(model.named_modules())) == ()
    for calls in ([], [3], [3, 3]):
        x, other = x_of().requires_grad_(), x_of().requires_grad_()
        assert_close(gradients(model, model.siblings(x)), gradients(twin, twin.siblings(other)))
        assert_close([x.grad], [other.grad])
        assert grouped == calls
        assert sharing.groups(dict(model.named_modules())) == (("q", "k", "v"),)
    assert len(single) == 3 + 9


def test_each_projection_takes_its_mask_of_the_leaders_seed(grouped: list[int]) -> None:
    model, x = learned(p=0.4), x_of()
    torch.manual_seed(3)
    ys = model.siblings(x)
    ours, after = gradients(model, ys), torch.rand(1)
    torch.manual_seed(3)
    seed = draw_seed("cpu")
    assert torch.equal(torch.rand(1), after)  # one seed is drawn
    twin = model_of().double()
    expected = [
        reference.lora_linear(
            x.double(),
            *(layer.weight, layer.lora_A, layer.lora_B, layer.bias),
            scaling=layer.scaling,
            dropout_p=0.4,
            keep_mask=dropout_mask(seed, 5, 8, 0.4, projection=i),
        )
        for i, layer in enumerate((twin.q, twin.k, twin.v))
    ]
    theirs = gradients(twin, expected)
    assert grouped == [3]
    assert all(oracle.relative_error(y.detach(), other.detach()) <= FLOOR for y, other in zip(ys, expected, strict=True))
    assert all(oracle.relative_error(ours[name], grad) <= FLOOR for name, grad in theirs.items())


def test_more_layers_than_one_pass_serves_are_several_groups(grouped: list[int]) -> None:
    model = inject(nn.ModuleList(nn.Linear(8, 4) for _ in range(6)), target_modules="all-linear", r=2).train()
    for _ in range(2):
        x = x_of()
        for layer in model:
            layer(x)
    assert grouped == [sharing.MASKS_AT_ONCE, 2]


def between(change: Callable[[Any, Tensor], Any]) -> Step:
    """A step with `change(model, x)` after the first sibling."""

    def step(model: Any, x: Tensor) -> list[Tensor]:
        y = model.q(x)
        change(model, x)
        return [y, model.k(x), model.v(x)]

    return step


def recycled(model: Any, x: Tensor) -> None:
    """x gets other values in other memory, which the allocator at last puts where the old one was."""
    value, address, used = 2 * x, x.data_ptr(), []
    x.data = torch.empty(0)
    while x.data_ptr() != address and len(used) < 1000:
        used.append(x.data)
        x.data = value.clone()


@torch.no_grad()
def doubled(model: Any, x: Tensor) -> None:
    model.k.lora_B.mul_(2)


def under(context: Callable[[], Any], inside: str = "k") -> Step:
    """A step with one sibling inside `context`."""

    def step(model: Any, x: Tensor) -> list[Tensor]:
        ys = []
        for name in "qkv":
            with context() if name == inside else nullcontext():
                ys.append(getattr(model, name)(x))
        return ys

    return step


def replaced(model: Any, x: Tensor) -> None:
    model.k.lora_A = nn.Parameter(model.k.lora_A.detach().clone())


#: name -> (a step, the number of its calls that a layer computes alone)
HAZARDS: dict[str, tuple[Step, int]] = {
    "nothing": (lambda model, x: model.siblings(x), 0),
    "x changed in place": (between(lambda model, x: x.detach().mul_(2)), 2),
    "another x": (lambda model, x: [model.q(x), model.k(2 * x), model.v(x)], 1),
    "an equal x": (lambda model, x: [model.q(x), model.k(x.clone().requires_grad_()), model.v(x)], 1),
    "a view of x": (lambda model, x: [model.q(x), model.k(x.view(1, *x.shape)), model.v(x)], 1),
    "x with other memory": (between(lambda model, x: setattr(x, "data", x.data * 2)), 2),
    "x with other memory at its address": (torch.no_grad()(between(recycled)), 2),  # a graph would keep the memory
    "x requires grad": (between(lambda model, x: x.requires_grad_()), 2),
    "no grad": (under(torch.no_grad), 1),
    "no grad before": (under(torch.no_grad, "q"), 2),
    "saved by hooks": (under(lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.cpu, Tensor.cpu)), 1),
    "autocast": (under(lambda: torch.autocast("cpu", torch.bfloat16)), 1),
    "autocast before": (under(lambda: torch.autocast("cpu", torch.bfloat16), "q"), 2),
    "adapter changed in place": (between(doubled), 1),
    "adapter swapped": (between(lambda model, x: setattr(model.k.lora_B, "data", model.k.lora_B.data * 3)), 1),
    "adapter replaced": (between(replaced), 1),
    "adapter frozen": (between(lambda model, x: model.k.lora_A.requires_grad_(False)), 1),
    "base swapped": (between(lambda model, x: setattr(model.k.weight, "data", model.k.weight.data * 3)), 1),
    "bias changed in place": (between(lambda model, x: model.v.bias.detach().zero_()), 1),
    "scaling": (between(lambda model, x: setattr(model.k, "scaling", 3.0)), 1),
    "rate": (between(lambda model, x: setattr(model.k, "lora_dropout", 1.0)), 1),
    "merged": (between(lambda model, x: model.k.merge()), 0),
    "evaluation": (between(lambda model, x: model.k.eval()), 1),
    "another backend": (between(lambda model, x: setattr(model.k, "backend", "torch")), 1),
    "hooks": (between(lambda model, x: model.k.register_forward_hook(lambda module, args, y: 2 * y)), 1),
    "another order": (lambda model, x: [model.k(x), model.q(x), model.v(x)], 1),
    "called twice": (lambda model, x: [model.q(x), model.k(x), model.k(x), model.v(x)], 1),
    "never called": (lambda model, x: [model.q(x), model.v(x)], 0),
}
#: They have no graph, or change what it has saved.
NO_BACKWARD = ("x changed in place", "x with", "adapter changed in place", "adapter swapped", "base swapped")


@pytest.mark.filterwarnings("ignore:a merged LoRA linear runs in training mode")
@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_layer_computes_alone_where_anything_differs(hazard: str, grouped: list[int], single: list[int]) -> None:
    step, alone = HAZARDS[hazard]
    model, twin = learned(), learned(groups=False)
    single.clear()
    ours = step(model, x_of())
    assert (grouped, len(single)) == ([3], alone)
    theirs = step(twin, x_of())
    assert_close(ours, theirs)
    if not hazard.startswith(NO_BACKWARD):
        assert_close(gradients(model, ours), gradients(twin, theirs))


def test_inference_mode_and_evaluation_share_nothing(grouped: list[int]) -> None:
    model, twin = learned(p=0.5), learned(groups=False)
    with torch.inference_mode():
        model.siblings(x_of())
    assert_close(model.eval().siblings(x_of()), twin.eval().siblings(x_of()))
    assert grouped == []


@pytest.mark.parametrize("change", ["hooks", "dtype", "backend", "tensor"])
def test_a_member_that_cannot_be_computed_is_left_out_and_says_why(change: str, grouped: list[int]) -> None:
    model, reason = learned(), sharing.UNLIKE
    if change == "hooks":
        model.k.register_forward_pre_hook(lambda module, args: None)
        reason = sharing.ALTERED
    elif change == "backend":
        model.k.backend = "torch"
    elif change == "dtype":
        model.k.double()
    else:
        weight = model.k._parameters.pop("lora_A")
        model.k.lora_A = weight * 1
        reason = sharing.REMADE
    x = x_of()
    ys = [model.q(x), model.k(x.to(model.k.weight.dtype)), model.v(x)]
    assert grouped == [2]
    assert_close(ys[::2], learned(groups=False).siblings(x)[::2])
    assert sharing.single_reason(model.k) == reason
    assert sharing.groups(dict(model.named_modules())) == (("q", "v"),)


@pytest.mark.parametrize("skipped", ["k", "qk"])
def test_a_member_that_is_not_called_ends_the_group(skipped: str, grouped: list[int], single: list[int]) -> None:
    model = learned()
    names = [name for name in "qkv" if name not in skipped]
    for _ in range(3):
        x = x_of()
        for name in names:
            getattr(model, name)(x)
    assert grouped == ([3] if "q" in names else [])  # without the leader nothing is computed ahead
    if "q" in names:
        assert sharing.single_reason(model.q) == sharing.NOT_CALLED
        assert sharing.groups(dict(model.named_modules())) == ()


def test_a_result_that_nobody_fetches_is_dropped() -> None:
    for end in ("leader", "evaluation", "deletion"):
        model = learned()
        model.q(x_of())
        waiting = weakref.ref(model.k._fastlora_group.pending.results[id(model.k)][1])
        assert waiting() is not None
        if end == "leader":
            model.q(x_of(2))
        elif end == "evaluation":
            model.eval().q(x_of(2))
        else:
            gone = weakref.ref(model)
            del model
            assert gone() is None
        assert waiting() is None, end


def test_nothing_waits_after_a_forward() -> None:
    model = learned()
    ys = model.siblings(x := x_of())
    seen = [weakref.ref(t) for t in (*ys, x)]
    del ys, x
    assert [ref() for ref in seen] == [None] * 4
    assert model.q._fastlora_group.pending is None


def test_copies_made_between_two_calls_hold_nothing_and_learn_again(grouped: list[int]) -> None:
    model, x = learned(), x_of()
    ys = [model.q(x)]
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model.k)
    state = copy.deepcopy(model.state_dict())
    ys += [model.k(x), model.v(x)]
    assert grouped == [3]
    assert_close(ys, learned(groups=False).siblings(x))
    assert list(state) == list(model_of(groups=False).state_dict())
    assert_close([copies[2](x_of())], ys[1:2])
    assert copies[2]._fastlora_group is not model.k._fastlora_group
    for other in copies[:2]:
        assert sharing.groups(dict(other.named_modules())) == ()
        other.siblings(x)
        assert_close(other.siblings(x), ys)
    assert grouped == [3] * 3


def test_threads_share_no_results(grouped: list[int], single: list[int]) -> None:
    model, results, barrier = learned(), {}, threading.Barrier(2)
    single.clear()

    def work(seed: int) -> None:
        x, ys = x_of(seed), []
        for name in "qkv":
            barrier.wait()
            ys.append(getattr(model, name)(x))
        results[seed] = ys

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (grouped, single) == ([3, 3], [])
    for seed, ys in results.items():
        assert_close(ys, learned(groups=False).siblings(x_of(seed)))


def test_torch_compile_traces_each_layer_alone(grouped: list[int]) -> None:
    model = learned()
    compiled = torch.compile(model.siblings, fullgraph=True, backend="eager")
    assert_close(compiled(x_of()), learned(groups=False).siblings(x_of()))
    assert grouped == []
    model.siblings(x_of())
    assert grouped == [3]  # compiled calls change nothing for eager ones


def test_options_of_inject() -> None:
    assert model_of(groups=False).q._fastlora_group is None
    with pytest.raises(TypeError, match="groups must be a bool, got int 1"):
        inject(Siblings(), target_modules=["q"], groups=1)
    layer = fastlora.FusedLoraLinear(8, 8)
    layer(x_of())
    assert layer._fastlora_group is None
