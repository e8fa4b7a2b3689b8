"""One size, every provider: draw, check against float64, time, count bytes.

Random tensors, the same for all providers, in as many sets as exceed the last-level cache, taken in turn.  Three passes:
forward as in training, backward alone (its forward runs untimed before it), and both together.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastlora import oracle
from fastlora.benchmark.clock import (
    Prepared,
    Quantiles,
    Step,
    copies_beyond_cache,
    device_clock,
    measure,
    quantiles,
    timed_launches,
)
from fastlora.benchmark.memory import peak_bytes, saved_bytes
from fastlora.benchmark.providers import Mask, Provider, Weights

PASSES = ("forward", "backward", "forward + backward")


class WrongResultError(RuntimeError):
    """A provider's result is further from float64 than the oracle allows, so there is nothing to time."""


@dataclass(frozen=True)
class Inputs:
    """One set of tensors: x (M, K), which requires a gradient, the weights, dy (M, N), and the seed of the masks."""

    x: Tensor
    weights: Weights
    dy: Tensor
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.x, self.dy, *self.weights) if t is not None)

    def plain(self) -> oracle.Inputs:
        """The same values as the oracle takes them."""
        weight, lora_A, lora_B, bias = self.weights
        return oracle.Inputs(self.x.detach(), weight, lora_A.detach(), lora_B.detach(), bias, self.dy, self.seed)


def draw(case: oracle.Case, device: torch.device, index: int = 0) -> Inputs:
    """Set number `index` of the case, drawn on `device`, with the variances of `oracle.draw`."""
    m, k, n = case.shape
    seed = (case.seed * 1_000_003 + index) % 2**63
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, fan_in: int = 1) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).div_(math.sqrt(fan_in)).to(dtype)

    x = normal(m, k, dtype=case.dtype)
    weight = normal(n, k, dtype=case.dtype, fan_in=k)
    lora_A = nn.Parameter(normal(case.rank, k, dtype=case.adapters, fan_in=k))
    lora_B = nn.Parameter(normal(n, case.rank, dtype=case.adapters, fan_in=case.rank))
    bias = normal(n, dtype=case.dtype) if case.bias else None
    return Inputs(x.requires_grad_(), Weights(weight, lora_A, lora_B, bias), normal(m, n, dtype=case.dtype), seed)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Judge:
    """Holds providers against float64 on one set of inputs; providers with the same mask share the computation."""

    def __init__(self, case: oracle.Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self._expected: dict[tuple[Mask | None, Callable[[float], float], bool], list[dict[str, Tensor]]] = {}

    def expected(self, provider: Provider) -> list[dict[str, Tensor]]:
        """[results in float64, results of eager torch in the case's dtypes] with the mask that the provider draws."""
        masked = provider.adapted and self.case.dropout_p > 0
        key = provider.mask if masked else None, provider.keep_scale, provider.adapted
        if key not in self._expected:
            device = self.inputs.x.device

            def mask(seed: int, rows: int, cols: int, p: float, device: torch.device = device) -> Tensor:
                with _seeded(seed, device):
                    return provider.mask(rows, cols, p, device)

            case = self.case if provider.adapted else replace(self.case, scaling=0.0, dropout_p=0.0)
            function = oracle.masked_reference(mask, provider.keep_scale)
            outputs = ("y", "dx", "dA", "dB")
            plain = self.inputs.plain()
            both = [oracle.evaluate(function, case, inputs, outputs) for inputs in (plain.double(), plain)]
            self._expected[key] = [{name: t for name, t in results.items() if t is not None} for results in both]
        return self._expected[key]

    def verify(self, provider: Provider) -> list[oracle.Row]:
        """The oracle's verdict on y and each gradient.

        Raises:
            WrongResultError: an error over its bound, with the table of all of them.
        """
        outputs = ("y", *provider.gradients)
        forward = provider.bind(self.inputs.weights, self.case.scaling, self.case.dropout_p)
        with _seeded(self.inputs.seed, self.inputs.x.device):
            y = forward(self.inputs.x)
            results = [y.detach(), *torch.autograd.grad(y, trained(provider, self.inputs), self.inputs.dy, allow_unused=True)]
        refs, eager = self.expected(provider)
        rows = [
            oracle.judge(self.case, name, result, eager[name], refs[name])
            for name, result in zip(outputs, results, strict=True)
        ]
        if not all(row.passed for row in rows):
            raise WrongResultError(f"{provider.name} is wrong on {self.case}, so it is not timed:\n{oracle.table(rows)}")
        return rows


def verify(provider: Provider, case: oracle.Case, device: torch.device) -> list[oracle.Row]:
    """Hold one provider against float64 on the case's first inputs; see `Judge.verify`."""
    return Judge(case, draw(case, device)).verify(provider)


def trained(provider: Provider, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradients its backward computes."""
    return [inputs.x, inputs.weights.lora_A, inputs.weights.lora_B] if provider.adapted else [inputs.x]


@dataclass
class Measurement:
    """What was measured of one provider: seconds of each timed run by pass, of launching it, and bytes."""

    provider: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    launch_seconds: dict[str, list[float]] = field(default_factory=dict)  # on a GPU only
    saved_bytes: int = 0
    peak_bytes: int = 0

    def quantiles(self, name: str) -> Quantiles:
        """Of a pass, in seconds."""
        return quantiles(self.seconds[name])


def steps_of(
    provider: Provider, case: oracle.Case, sets: Sequence[Inputs], turn: Iterator[int] | None = None
) -> dict[str, Step]:
    """The three passes of `provider`, each call on the next of `sets`.

    turn: whose turn it is, by index; shared by providers that are timed side by side, so that none finds in the cache what
    the one before it has read.
    """
    bound = [(inputs, provider.bind(inputs.weights, case.scaling, case.dropout_p)) for inputs in sets]
    turn = turn or itertools.cycle(range(len(sets)))

    def forward() -> Tensor:
        return run_forward()[1]

    def run_forward() -> tuple[Inputs, Tensor]:
        inputs, function = bound[next(turn)]
        return inputs, function(inputs.x)

    def backward(state: tuple[Inputs, Tensor]) -> object:
        inputs, y = state
        return torch.autograd.grad(y, trained(provider, inputs), inputs.dy)

    return dict(zip(PASSES, (forward, Prepared(run_forward, backward), lambda: backward(run_forward())), strict=True))


def run(
    rivals: Iterable[Provider],
    case: oracle.Case,
    device: torch.device,
    *,
    repeats: int,
    limit: float = math.inf,
    copies: int | None = None,
    excluded: dict[str, Exception] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Check every provider, then time its passes against those of the others and count its bytes.

    Args:
        repeats, limit: see `measure`.
        copies: sets of inputs to take in turn; default as many as exceed the cache.
        excluded: where a provider that is wrong or fails is put by name with its error, to be left out; by default its error
            is raised.
        progress: called with what was just done: len(rivals) + WARMUP times, and after each timed round.

    Raises:
        WrongResultError: before anything is timed, when a provider's result is wrong.
    """
    rivals = list(rivals)
    if any(provider.compiled for provider in rivals):
        torch.compiler.reset()  # what was compiled for other cases counts against the limit of recompilations
    first = draw(case, device)
    judge = Judge(case, first)
    for provider in rivals:
        try:
            judge.verify(provider)
        except Exception as error:  # torch.compile, Triton and PEFT have no base of their errors in common
            if excluded is None:
                raise
            excluded[provider.name] = error.with_traceback(None)  # its frames hold the tensors
        progress(f"checked {provider.name}")
    del judge
    rivals = [provider for provider in rivals if provider.name not in (excluded or {})]
    copies = copies or copies_beyond_cache(first.nbytes, device)
    sets = [first, *(draw(case, device, index) for index in range(1, copies))]
    turn = itertools.cycle(range(copies))
    passes = {provider.name: steps_of(provider, case, sets, turn) for provider in rivals}
    steps = {(provider, name): step for provider, by_pass in passes.items() for name, step in by_pass.items()}
    clock = device_clock(device)
    seconds = measure(steps, device, repeats, limit=limit, clock=clock, progress=progress)
    launches = timed_launches(clock)
    parameters = [tensor for inputs in sets for tensor in inputs.weights]  # they live, saved or not
    return [
        Measurement(
            name,
            {pass_: seconds[name, pass_] for pass_ in PASSES},
            {pass_: launches[name, pass_] for pass_ in PASSES if launches},
            saved_bytes(by_pass["forward"], parameters),
            peak_bytes(by_pass["forward + backward"], device),
        )
        for name, by_pass in passes.items()
    ]
