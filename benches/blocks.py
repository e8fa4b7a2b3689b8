"""The parts of a decoder layer that adapters change, as functions of their linears: attention's projections, and the gated MLP.

All tensors have one dtype.  Every provider is checked against float64, outputs and all gradients, with the masks that it draws
itself, before it is timed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import chained
from benches.setting import (
    ATTENTION,
    CHAINED,
    COMPILED_PEFT,
    DROPOUT_P,
    FASTLORA,
    FROZEN,
    MLP,
    SINGLE,
    Failed,
    R,
    Ready,
    Setting,
    contenders,
)
from fastlora import dropout, oracle, reference
from fastlora.benchmark import WrongResultError, providers, trial
from fastlora.benchmark.clock import copies_beyond_cache
from fastlora.blocks.mlp import lora_mlp
from fastlora.blocks.projections import Projection, lora_linears
from fastlora.functional import dropout_mask, lora_linear

SCALING = 2.0

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]  # of the block's inputs
Linears = Sequence[Callable[[Tensor], Tensor]]
Masks = Callable[[Sequence[int]], list[Tensor]]  # of linears with these in_features


@dataclass(frozen=True)
class Block:
    """outputs = run(linears, *inputs), and the same in steps that several linears share.

    linears: their names in a `Decoder`.  inputs, outputs: the linears whose x, or y, each of them is.
    grouped: called like run, with a Projection of each linear.  seeds: how many linears share each seed that it draws.
    chained: called like run, with (W, A, B, bias) of each linear.
    """

    linears: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Callable[..., Outputs]
    grouped: Callable[..., Outputs]
    seeds: tuple[int, ...]
    chained: Callable[..., Outputs]


def _attention(linears: Linears, x: Tensor, mixed: Tensor) -> Outputs:
    q, k, v, o = linears
    return q(x), k(x), v(x), o(mixed)


def _grouped_attention(linears: Sequence[Projection], x: Tensor, mixed: Tensor) -> Outputs:
    *qkv, o = linears
    return *lora_linears(x, qkv), *lora_linears(mixed, [o])


def _chained_attention(linears: Sequence[oracle.Weights], x: Tensor, mixed: Tensor) -> Outputs:
    return *chained.projections(x, linears[:3], SCALING), *chained.projections(mixed, linears[3:], SCALING)


def _mlp(linears: Linears, x: Tensor) -> Outputs:
    gate, up, down = linears
    return (down(F.silu(gate(x)) * up(x)),)


def _grouped_mlp(linears: Sequence[Projection], x: Tensor) -> Outputs:
    return (lora_mlp(x, *linears),)


def _chained_mlp(linears: Sequence[oracle.Weights], x: Tensor) -> Outputs:
    return (chained.mlp(x, linears, SCALING),)


#: Attention's own work, from q, k and v to the input of o, is left out: it is the same for all.
BLOCKS = {
    ATTENTION: Block(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        (0, 3),
        (0, 1, 2, 3),
        _attention,
        _grouped_attention,
        (3, 1),
        _chained_attention,
    ),
    MLP: Block(("gate_proj", "up_proj", "down_proj"), (0,), (2,), _mlp, _grouped_mlp, (3,), _chained_mlp),
}


@dataclass(frozen=True)
class Contender:
    """function(*inputs) -> outputs, which draws its masks from torch's default generator, as in training.

    From the same state of the generator, masks(in_features of each linear) returns them; None: it has no dropout.
    adapted: whether it has adapters.
    """

    function: Function
    masks: Masks | None = None
    keep_scale: Callable[[float], float] = dropout.keep_scale
    adapted: bool = True


@dataclass(frozen=True)
class Tensors:
    """The weights of each linear, and the block's inputs and gradients of its outputs in as many sets as exceed the cache."""

    block: Block
    weights: list[oracle.Weights]
    sets: list[tuple[list[Tensor], list[Tensor]]]

    @property
    def adapters(self) -> list[Tensor]:
        """Every A, then every B."""
        return [own[i] for i in (1, 2) for own in self.weights]  # type: ignore[misc]  # only a bias may be None


def draw(block: Block, setting: Setting, device: torch.device, copies: int | None) -> Tensors:
    """Random tensors as of `oracle.draw`; inputs and adapters require gradients."""
    shapes = {name: (one.in_features, one.out_features) for one in setting.decoder.linears for name in one.names}
    cases = [
        oracle.Case((setting.rows, *shapes[name]), R, setting.dtype, bias=False, seed=i) for i, name in enumerate(block.linears)
    ]

    def one_set(index: int) -> tuple[list[oracle.Weights], list[Tensor], list[Tensor]]:
        drawn = [oracle.draw(case, index=index, device=device) for case in cases]
        return [one.weights for one in drawn], [drawn[i].x for i in block.inputs], [drawn[i].dy for i in block.outputs]

    weights, *first = one_set(0)
    copies = copies or copies_beyond_cache(sum(tensor.nbytes for tensors in first for tensor in tensors), device)
    sets = [(first[0], first[1]), *(one_set(index)[1:] for index in range(1, copies))]
    for tensor in itertools.chain(*(inputs for inputs, _ in sets), *(own[1:3] for own in weights)):
        tensor.requires_grad_()
    return Tensors(block, weights, sets)


def contender(name: str, tensors: Tensors, setting: Setting, device: torch.device) -> Contender:
    """One of `contenders`, on these weights."""
    block, weights = tensors.block, tensors.weights
    rows, p = setting.rows, DROPOUT_P

    def each(bind: Callable[[oracle.Weights, float, float], Any]) -> Function:
        return partial(block.run, [bind(own, SCALING, p) for own in weights])

    def masks_of(mask: providers.Mask) -> Masks:
        return lambda widths: [mask(rows, width, p, device) for width in widths]

    def grouped_masks(widths: Sequence[int]) -> list[Tensor]:
        remaining = iter(widths)
        seeds = [(dropout.draw_seed(device), n) for n in block.seeds]
        return [dropout_mask(seed, rows, next(remaining), p, projection=i) for seed, n in seeds for i in range(n)]

    if name == FROZEN:
        return Contender(each(providers.of_call(providers.frozen_linear)), adapted=False)
    if name == CHAINED:
        return Contender(partial(block.chained, weights))
    if name == SINGLE:
        return Contender(each(providers.of_call(lora_linear)), masks_of(providers.fastlora_mask))
    if name == FASTLORA:
        return Contender(partial(block.grouped, [Projection(*own, SCALING, p) for own in weights]), grouped_masks)
    function, masks = each(providers.peft_layer), masks_of(providers.torch_mask(F.dropout, setting.dtype))
    if name == COMPILED_PEFT:  # its masks are drawn by a compiled function too: Inductor draws other random numbers
        compile_: Callable[[Any], Any] = partial(torch.compile, backend=setting.compiler, dynamic=False)
        return Contender(compile_(function), compile_(masks), providers.torch_keep_scale)
    return Contender(function, masks, providers.torch_keep_scale)


def verify(name: str, one: Contender, tensors: Tensors, setting: Setting) -> list[oracle.Row]:
    """The oracle's verdict on every output and gradient.

    Raises:
        WrongResultError: an error is over its bound; the message has the table of all errors.
    """
    block, weights, (inputs, dys) = tensors.block, tensors.weights, tensors.sets[0]
    with torch.random.fork_rng([inputs[0].device] if inputs[0].is_cuda else []):
        torch.manual_seed(0)
        masks = one.masks([own[0].shape[1] for own in weights]) if one.masks else [None] * len(weights)
        torch.manual_seed(0)
        result = _results(one.function, inputs, tensors.adapters if one.adapted else [], dys)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        copies: list[Any] = [[t if t is None else t.detach().to(dtype) for t in own] for own in weights]
        adapters = [own[i].requires_grad_() for i in (1, 2) for own in copies] if one.adapted else []
        linears = [partial(_masked, own, mask, one) for own, mask in zip(copies, masks, strict=True)]
        grads = [dy.to(dtype) for dy in dys]
        return _results(partial(block.run, linears), leaves, adapters, grads)

    eager, ref = expected(setting.dtype), expected(torch.float64)
    case = oracle.Case((1, 1, 1), dtype=setting.dtype)
    rows = [oracle.judge(case, key, result[key], eager[key], ref[key]) for key in ref]
    if not all(row.passed for row in rows):
        raise WrongResultError(f"{name} is wrong, so it is not timed:\n{oracle.table(rows)}")
    return rows


def _masked(weights: Sequence[Any], mask: Tensor | None, one: Contender, x: Tensor) -> Tensor:
    """The eager linear with the mask of a contender."""

    def drop(x: Tensor) -> Tensor:
        assert mask is not None
        return torch.where(mask, x * one.keep_scale(DROPOUT_P), 0.0)

    scaling = SCALING if one.adapted else 0.0
    return reference.lora_linear(x, *weights, scaling=scaling, dropout=None if mask is None else drop)


def _results(function: Function, inputs: list[Tensor], adapters: list[Tensor], dys: list[Tensor]) -> dict[str, Tensor]:
    """Each output y0, y1, ..., and the gradients dx0, ..., dA0, ..., dB0, ..."""
    outputs = function(*inputs)
    grads = torch.autograd.grad(outputs, [*inputs, *adapters], dys)
    half = len(adapters) // 2
    names = [f"{name}{i}" for name, n in (("dx", len(inputs)), ("dA", half), ("dB", half)) for i in range(n)]
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return found | dict(zip(names, grads, strict=True))


def steps(kind: str, setting: Setting, device: torch.device, failed: Failed, copies: int | None = None) -> Ready:
    """The passes of a block, for every contender that is right."""
    tensors = draw(BLOCKS[kind], setting, device, copies)
    turn = itertools.cycle(tensors.sets)
    found = {}
    for name in contenders(setting.compiler):
        try:
            one = contender(name, tensors, setting, device)
            verify(name, one, tensors, setting)
            found[name] = trial.passes(*_halves(one, tensors, turn))
        except Exception as error:  # torch.compile, Triton and PEFT have no base of their errors in common
            failed(name, error)
    parameters = [tensor for own in tensors.weights for tensor in own if tensor is not None]
    return Ready({(name, pass_): found[name][pass_] for pass_ in trial.PASSES for name in found}, parameters)


def _halves(one: Contender, tensors: Tensors, turn: Iterator[Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    adapters = tensors.adapters if one.adapted else []

    def forward() -> tuple[list[Tensor], Outputs, list[Tensor]]:
        inputs, dys = next(turn)
        return inputs, one.function(*inputs), dys

    def backward(state: tuple[list[Tensor], Outputs, list[Tensor]]) -> Outputs:
        inputs, outputs, dys = state
        return torch.autograd.grad(outputs, [*inputs, *adapters], dys)

    return forward, backward


STEPS = {kind: partial(steps, kind) for kind in BLOCKS}
