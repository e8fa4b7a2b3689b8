"""One size, all providers: draw, check against float64, time, count bytes.

All providers get the same random tensors, in as many sets as exceed the last-level cache, taken in turn.  There are three
passes: forward as in training, backward alone (after an untimed forward), and both together.

A row is one pass of one provider, as a dict: "provider", "pass", "median_ms", "p20_ms", "p80_ms", ratios of medians,
"launch_ms", "launches", "saved_bytes" and "peak_bytes".  launch_ms, the host's time to launch the pass, is measured on a GPU
only.  Only the last pass of a provider has bytes and launches.  A value that was not measured is None.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora import oracle
from fastlora.benchmark.ceilings import compulsory_bytes
from fastlora.benchmark.clock import WARMUP, CudaClock, Prepared, Step, copies_beyond_cache, device_clock, measure, quantiles
from fastlora.benchmark.launches import launches
from fastlora.benchmark.memory import peak_bytes, saved_bytes, total_bytes
from fastlora.benchmark.providers import COMPILED, EAGER, FROZEN, Provider

PASSES = ("forward", "backward", "forward + backward")

Key = tuple[str, str]  # provider, pass
Timed = tuple[list[dict[str, Any]], dict[Key, list[float]]]  # rows, and the seconds of each round behind them


class WrongResultError(RuntimeError):
    """A provider's result is further from float64 than the oracle allows, so it is not timed."""


def draw(case: oracle.Case, device: torch.device, index: int = 0) -> oracle.Inputs:
    """Set number `index` of the case, drawn on `device`; x, A and B require gradients."""
    inputs = oracle.draw(case, index=index, device=device)
    for tensor in (inputs.x, inputs.lora_A, inputs.lora_B):
        tensor.requires_grad_()
    return inputs


def verify(provider: Provider, case: oracle.Case, inputs: oracle.Inputs, known: dict[Any, oracle.Judge]) -> list[oracle.Row]:
    """The oracle's verdict on y and each gradient of a provider.

    known: keeps the judges for these inputs, which providers with the same mask share.

    Raises:
        WrongResultError: an error is over its bound; the message has the table of all errors.
    """

    def function(x: Tensor, *weights: Any, scaling: float, dropout_p: float, seed: int) -> Tensor:
        forward = provider.bind(weights, scaling, dropout_p)
        torch.manual_seed(seed)
        return forward(x)

    def mask(seed: int, rows: int, cols: int, p: float, device: torch.device) -> Tensor:
        torch.manual_seed(seed)
        return provider.mask(rows, cols, p, device)

    key = provider.mask, provider.keep_scale, provider.outputs
    with torch.random.fork_rng([inputs.x.device] if inputs.x.is_cuda else []):
        if key not in known:
            right = case if "dA" in provider.outputs else replace(case, scaling=0.0, dropout_p=0.0)  # the frozen linear alone
            known[key] = oracle.Judge(right, [inputs], provider.outputs, oracle.masked_reference(mask, provider.keep_scale))
        rows = known[key].rows(function)
    if not all(row.passed for row in rows):
        raise WrongResultError(f"{provider.name} is wrong on {case}, so it is not timed:\n{oracle.table(rows)}")
    return rows


def trained(provider: Provider, inputs: oracle.Inputs) -> list[Tensor]:
    """The tensors whose gradients its backward computes."""
    return [getattr(inputs, oracle.ARGUMENT_OF[output]) for output in provider.outputs[1:]]


def steps_of(provider: Provider, case: oracle.Case, sets: Sequence[oracle.Inputs], turn: Iterator[int]) -> dict[str, Step]:
    """The three passes of `provider`, each call on the set of the next index in `turn`."""
    bound = [(inputs, provider.bind(inputs.weights, case.scaling, case.dropout_p)) for inputs in sets]

    def forward() -> tuple[oracle.Inputs, Tensor]:
        inputs, function = bound[next(turn)]
        return inputs, function(inputs.x)

    def backward(state: tuple[oracle.Inputs, Tensor]) -> object:
        inputs, y = state
        return torch.autograd.grad(y, trained(provider, inputs), inputs.dy)

    return passes(forward, backward)


def passes(forward: Callable[[], Any], backward: Callable[[Any], object]) -> dict[str, Step]:
    """The steps of PASSES; backward takes what forward returns."""
    return dict(zip(PASSES, (forward, Prepared(forward, backward), lambda: backward(forward())), strict=True))


def timed(
    steps: Mapping[Key, Step],
    device: torch.device,
    ratios: Mapping[str, str],
    parameters: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> Timed:
    """Time steps against each other, and count bytes and launches of each provider's last pass; a row for each step.

    Args:
        ratios: column -> the provider to whose median the column relates.
        parameters: tensors that exist anyway and do not count as saved; default: saved bytes are not counted.
        options: repeats, limit and progress, see `measure`.
    """
    clock = device_clock(device)
    seconds = measure(steps, device, clock=clock, **options)
    spread = {key: quantiles(times) for key, times in seconds.items()}
    last = dict(iter(steps))  # by provider
    rows = []
    for (provider, pass_), step in steps.items():
        p20, median, p80 = spread[provider, pass_]
        row = {"provider": provider, "pass": pass_, "median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}
        row |= {column: median / spread[other, pass_].median for column, other in ratios.items()}
        row |= dict.fromkeys(("launch_ms", "launches", "saved_bytes", "peak_bytes"))
        if isinstance(clock, CudaClock):
            row["launch_ms"] = quantiles(clock.launches[provider, pass_][WARMUP:]).median * 1e3
        if last[provider] == pass_:
            row["saved_bytes"] = None if parameters is None else saved_bytes(step, parameters)
            row["peak_bytes"] = peak_bytes(step, device)
            if device.type == "cuda" or provider not in COMPILED:  # its code on a CPU is no operation of torch
                row["launches"] = launches(step, device)
        rows.append(row)
    return rows, seconds


def reraise(provider: Provider, error: Exception) -> None:
    """No failure is accepted."""
    raise error


def prepare(
    rivals: Iterable[Provider],
    case: oracle.Case,
    device: torch.device,
    *,
    failed: Callable[[Provider, Exception], None] = reraise,
    copies: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, dict[str, Step]], list[oracle.Inputs]]:
    """Check every provider: the steps of those that are right, by name and pass, and the sets of inputs that these read.

    Args:
        failed: called with each provider that is wrong or fails, and its error; the provider is left out unless it raises.
        copies: sets of inputs to take in turn; default as many as exceed the cache.
        progress: called after each check.
    """
    first, right = draw(case, device), []
    known: dict[Any, oracle.Judge] = {}
    for provider in rivals:
        try:
            verify(provider, case, first, known)
            right.append(provider)
        except Exception as error:  # torch.compile, Triton and PEFT have no base of their errors in common
            failed(provider, error)
        progress(f"checked {provider.name}")
    del known  # its float64 results would take memory from what is timed
    copies = copies or copies_beyond_cache(first.nbytes, device)
    sets = [first, *(draw(case, device, index) for index in range(1, copies))]
    turn = itertools.cycle(range(copies))  # shared: none finds in the cache what the one before it has read
    return {provider.name: steps_of(provider, case, sets, turn) for provider in right}, sets


def run(
    rivals: Sequence[Provider],
    case: oracle.Case,
    device: torch.device,
    *,
    failed: Callable[[Provider, Exception], None] = reraise,
    copies: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Timed:
    """Check every provider, then time its passes against those of the others and count its bytes.

    Args:
        rivals: among them the frozen linear and eager LoRA, to which all rows relate.
        failed, copies: see `prepare`.
        progress: called with what was just done: len(rivals) + WARMUP times, and after each timed round.
        options: repeats and limit, see `measure`.

    Raises:
        torch.OutOfMemoryError: the tensors are larger than the device's memory.
        WrongResultError: a provider's result is wrong; nothing has been timed.
    """
    needed = compulsory_bytes(case, "forward") * (1 + 8 // case.dtype.itemsize)  # and again in float64
    if needed > (memory := total_bytes(device)):
        raise torch.OutOfMemoryError(f"{case} needs at least {needed >> 30:,} GiB; {device} has {memory >> 30:,} GiB")
    if any(provider.name in COMPILED for provider in rivals):
        torch.compiler.reset()  # what was compiled for other cases counts against the limit of recompilations
    steps, sets = prepare(rivals, case, device, failed=failed, copies=copies, progress=progress)
    by_pass = {(name, pass_): steps[name][pass_] for pass_ in PASSES for name in steps}
    parameters = [tensor for inputs in sets for tensor in inputs.weights]
    return timed(by_pass, device, {"over_frozen": FROZEN, "over_eager": EAGER}, parameters, progress=progress, **options)
