"""One size, all providers: draw, check against float64, time, count bytes.

All providers get the same random tensors, in as many sets as exceed the last-level cache, taken in turn.  There are three
passes: forward as in training, backward alone (after an untimed forward), and both together.

A row is one pass of one provider, as a dict: "provider", "pass", "median_ms", "p20_ms", "p80_ms", ratios of medians,
"launch_ms", "saved_bytes" and "peak_bytes".  launch_ms, the host's time to launch the pass, is measured on a GPU only.  Only
the last pass of a provider has bytes.  A value that was not measured is None.
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


class Judge:
    """Checks providers against float64 on one set of inputs; providers that draw the same mask share the float64 results."""

    def __init__(self, case: oracle.Case, inputs: oracle.Inputs) -> None:
        self.case, self.inputs = case, inputs
        self._expected: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def verify(self, provider: Provider) -> list[oracle.Row]:
        """The oracle's verdict on y and each gradient.

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

        outputs, x = provider.outputs, self.inputs.x
        key = provider.mask, provider.keep_scale, outputs
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            results = oracle.evaluate(function, self.case, self.inputs, outputs)
            if key not in self._expected:
                case = self.case if "dA" in outputs else replace(self.case, scaling=0.0, dropout_p=0.0)
                truth, both = oracle.masked_reference(mask, provider.keep_scale), (self.inputs, self.inputs.double())
                self._expected[key] = [oracle.evaluate(truth, case, inputs, outputs) for inputs in both]
        eager, refs = self._expected[key]
        rows = [oracle.judge(self.case, name, results[name], eager[name], refs[name]) for name in outputs]
        if not all(row.passed for row in rows):
            raise WrongResultError(f"{provider.name} is wrong on {self.case}, so it is not timed:\n{oracle.table(rows)}")
        return rows


def trained(provider: Provider, inputs: oracle.Inputs) -> list[Tensor]:
    """The tensors whose gradients its backward computes."""
    return [getattr(inputs, oracle.ARGUMENT_OF[output]) for output in provider.outputs[1:]]


def steps_of(
    provider: Provider, case: oracle.Case, sets: Sequence[oracle.Inputs], turn: Iterator[int] | None = None
) -> dict[str, Step]:
    """The three passes of `provider`, each call on the next of `sets`.

    turn: indices into `sets`.  Providers that are timed side by side share it, so that none finds its inputs in the cache
    because the one before it has read them.
    """
    bound = [(inputs, provider.bind(inputs.weights, case.scaling, case.dropout_p)) for inputs in sets]
    turn = turn or itertools.cycle(range(len(sets)))

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
    """Time steps against each other, and count the bytes of each provider's last pass; a row for each step.

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
        row |= dict.fromkeys(("launch_ms", "saved_bytes", "peak_bytes"))
        if isinstance(clock, CudaClock):
            row["launch_ms"] = quantiles(clock.launches[provider, pass_][WARMUP:]).median * 1e3
        if last[provider] == pass_:
            row["saved_bytes"] = None if parameters is None else saved_bytes(step, parameters)
            row["peak_bytes"] = peak_bytes(step, device)
        rows.append(row)
    return rows, seconds


def run(
    rivals: Iterable[Provider],
    case: oracle.Case,
    device: torch.device,
    *,
    copies: int | None = None,
    excluded: dict[str, Exception] | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Timed:
    """Check every provider, then time its passes against those of the others and count its bytes.

    Args:
        rivals: among them the frozen linear and eager LoRA, to which all rows relate.
        copies: sets of inputs to take in turn; default as many as exceed the cache.
        excluded: collects the errors of providers that are wrong or fail, by name, and leaves these providers out.  The error
            of the frozen linear or of eager LoRA is raised, and by default any.
        progress: called with what was just done: len(rivals) + WARMUP times, and after each timed round.
        options: repeats and limit, see `measure`.

    Raises:
        torch.OutOfMemoryError: the tensors are larger than the device's memory.
        WrongResultError: a provider's result is wrong; nothing has been timed.
    """
    rivals = list(rivals)
    needed = compulsory_bytes(case, "forward") * (1 + 8 // case.dtype.itemsize)  # and again in float64
    if needed > (memory := total_bytes(device)):
        raise torch.OutOfMemoryError(f"{case} needs at least {needed >> 30:,} GiB; {device} has {memory >> 30:,} GiB")
    if any(provider.name in COMPILED for provider in rivals):
        torch.compiler.reset()  # what was compiled for other cases counts against the limit of recompilations
    first = draw(case, device)
    judge = Judge(case, first)
    for provider in list(rivals):
        try:
            judge.verify(provider)
        except Exception as error:  # torch.compile, Triton and PEFT have no base of their errors in common
            if excluded is None or provider.name in (FROZEN, EAGER):
                raise
            excluded[provider.name] = error.with_traceback(None)  # its frames hold the tensors
            rivals.remove(provider)
        progress(f"checked {provider.name}")
    del judge
    copies = copies or copies_beyond_cache(first.nbytes, device)
    sets = [first, *(draw(case, device, index) for index in range(1, copies))]
    turn = itertools.cycle(range(copies))
    steps = {provider.name: steps_of(provider, case, sets, turn) for provider in rivals}
    by_pass = {(name, pass_): steps[name][pass_] for pass_ in PASSES for name in steps}
    parameters = [tensor for inputs in sets for tensor in inputs.weights]
    return timed(by_pass, device, {"over_frozen": FROZEN, "over_eager": EAGER}, parameters, progress=progress, **options)
