"""Measure which form, and which tile of "fused", is fastest on this GPU: what `fastlora tune` runs.

For each problem every candidate is held against float64.  Those that are right are timed in turn, through `lora_linear`, and
the winner is stored before the next problem begins.  What is stored is not measured again unless asked for.

The fastest median wins among the candidates whose 80th percentile is below the default's 20th: a difference within the spread
keeps the default.  Where the default itself cannot run or is wrong, the fastest median wins.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from triton.errors import TritonError

from fastlora import dispatch, oracle
from fastlora.backends import available_backends
from fastlora.benchmark import trial
from fastlora.benchmark.clock import Quantiles, measure, quantiles
from fastlora.benchmark.providers import Provider, of_call
from fastlora.dispatch import Problem, default_choice, next_power_of_2
from fastlora.dropout import threshold
from fastlora.functional import lora_linear
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.target import Target, target_of

_WRONG = "its result is wrong"


@dataclass(frozen=True)
class Tuned:
    """What was found for one problem.

    Attributes:
        choice: the winner; None where nothing could be measured, and `skipped` says why.
        seconds: by choice.  left_out: the candidates that do not run here or are wrong, and why.
        kept: the choice comes from an earlier run, and nothing was measured.
    """

    problem: Problem
    default: str
    choice: str | None = None
    seconds: dict[str, Quantiles] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    kept: bool = False

    @property
    def wrong(self) -> bool:
        """Whether a candidate was further from float64 than the oracle allows."""
        return any(reason.startswith(_WRONG) for reason in self.left_out.values())

    @property
    def speedup(self) -> Quantiles | None:
        """Of the choice over the default: the ratio of the medians, between the ratios of opposite percentiles."""
        if self.choice not in self.seconds or self.default not in self.seconds:
            return None
        default, chosen = self.seconds[self.default], self.seconds[self.choice]
        return Quantiles(default.p20 / chosen.p80, default.median / chosen.median, default.p80 / chosen.p20)


def problems_for(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], ranks: Iterable[int], dropouts: Iterable[bool], dtype: torch.dtype
) -> list[Problem]:
    """Both steps of linears of these shapes (in, out), each problem once: rows count as the next power of two."""
    precision, powers = matmul_precision(dtype), map(next_power_of_2, rows)
    combinations = itertools.product(shapes, ranks, powers, dropouts, ("forward", "backward"))
    problems = (Problem(direction, dtype, m, k, n, r, p, precision) for (k, n), r, m, p, direction in combinations)
    return list(dict.fromkeys(problems))


def decide(seconds: Mapping[str, Quantiles], default: str) -> str:
    """The rule at the head of this file."""
    faster = seconds
    if default in seconds:
        faster = {choice: times for choice, times in seconds.items() if times.p80 < seconds[default].p20}
    return min(faster, key=lambda choice: faster[choice].median, default=default)


@torch._dynamo.forbid_in_graph  # our own refusal would be a graph break, after which Dynamo calls `tune` untraced
def tune(
    problems: Iterable[Problem],
    device: torch.device | str = "cuda",
    *,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.1,
    repeats: int = 20,
    again: bool = False,
) -> Iterator[Tuned]:
    """Each step of this iterator measures a problem that was not measured before, stores the winner, and yields the outcome.

    A problem that runs out of memory is skipped.  A candidate that does not compile or whose result is wrong is left out.

    Args:
        adapter_dtype: of A and B; default: the problem's dtype.
        dropout_p: the rate of the problems with dropout.
        repeats: timed rounds of each problem.
        again: also measure the problems that are stored.  Otherwise they keep their choice, whatever adapter_dtype, dropout_p
            and repeats it was measured with.

    Raises:
        RuntimeError: no CUDA GPU of capability 8.0 or newer, or a CUDA graph is being captured.  (Under torch.compile Dynamo
            refuses with AssertionError.)
        ValueError: a dropout_p that never drops.
        OSError: the cache cannot be written; before anything is measured.
    """
    if threshold(dropout_p) == 0:
        raise ValueError(f"dropout_p must be at least 1/32768, the rate of the problems with dropout, got {dropout_p}")
    device = torch.device(device)
    target = check_device(device)
    dispatch.store(target, {})
    before = {} if again else dispatch.stored(target)

    def outcome(problem: Problem) -> Tuned:
        if str(problem) in before:
            return Tuned(problem, default_choice(problem, target), before[str(problem)], kept=True)
        shape = problem.rows, problem.in_features, problem.out_features
        p = dropout_p if problem.dropout else 0.0
        case = oracle.Case(shape, problem.r, problem.dtype, adapter_dtype, bias=False, dropout_p=p)
        tuned = _measure(problem, case, dispatch.candidates(problem, target), device, repeats)
        if tuned.choice is None:
            torch.cuda.empty_cache()
        else:
            dispatch.store(target, {problem: tuned.choice})
        return tuned

    return map(outcome, problems)


def _measure(problem: Problem, case: oracle.Case, choices: list[str], device: torch.device, repeats: int) -> Tuned:
    """Check the candidates, then time those that are right."""
    left_out = {}

    def leave_out(provider: Provider, error: Exception) -> None:
        candidates_fault = isinstance(error, TritonError | RuntimeError)  # the compiler's passes fail with RuntimeError
        # The others are the problem's fault, or the device's, which runs nothing after that.
        if not candidates_fault or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise error
        wrong = isinstance(error, trial.WrongResultError)
        left_out[provider.name] = f"{_WRONG}: {error}" if wrong else f"{type(error).__name__}: {_first_line(error)}"

    providers = [Provider(choice, of_call(partial(lora_linear, backend=choice))) for choice in choices]
    try:
        steps, _ = trial.prepare(providers, case, device, failed=leave_out)
        if not steps:
            return Tuned(problem, choices[0], left_out=left_out, skipped="no candidate is left")
        times = measure({choice: passes[problem.direction] for choice, passes in steps.items()}, device, repeats)
    except torch.OutOfMemoryError as error:
        return Tuned(problem, choices[0], left_out=left_out, skipped=f"out of memory: {_first_line(error)}")
    seconds = {choice: quantiles(rounds) for choice, rounds in times.items()}
    return Tuned(problem, choices[0], decide(seconds, choices[0]), seconds, left_out)


def check_device(device: torch.device) -> Target:
    """The target of a device to tune on.  Raises RuntimeError as `tune` does."""
    target = target_of(device) if "triton" in available_backends(device) else None
    if target is None or not target.name:
        raise RuntimeError(f"tuning needs a CUDA GPU of capability 8.0 or newer; the device is {device}")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastlora.tune measures, which a CUDA graph cannot capture: call it before the capture begins")
    return target


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
