"""Measuring which form, and which tile of the fused one, is fastest on this GPU: what `fastlora tune` runs.

Every candidate for a problem is held against float64, then all that are right are timed in turn, through the public function
and as a user will get them, and the winner is stored before the next problem begins.  What is stored is not measured again,
unless that is asked for.

The rule: the fastest median wins among the candidates whose 80th percentile is below the 20th percentile of the default, so
that a difference within the spread of the times keeps the default.  Where the default itself cannot run or is wrong, the
fastest median wins.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from triton.errors import TritonError

from fastlora import choices, oracle
from fastlora.benchmark.clock import Prepared, Quantiles, copies_beyond_cache, measure, quantiles
from fastlora.benchmark.providers import Provider, of_call
from fastlora.benchmark.trial import Judge, WrongResultError, draw, steps_of
from fastlora.dropout import threshold
from fastlora.functional import available_backends, lora_linear
from fastlora.kernels.config import gemm_config
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.forms import Choice, Problem, default_choice, next_power_of_2
from fastlora.kernels.target import Target, target_of

DIRECTIONS = ("forward", "backward")
REPEATS = 20
LORA_LINEAR = Provider("fastlora", of_call(partial(lora_linear, backend="triton")))

Times = Mapping[Choice, list[float]]
Clock = Callable[[Mapping[Choice, Prepared]], Times]  # seconds of each step, round by round


@dataclass(frozen=True)
class Result:
    """What was found for one problem; choice is None where nothing could be measured, and `skipped` says why.

    kept: the choice is an earlier run's, and nothing was measured now.
    """

    problem: Problem
    default: Choice
    choice: Choice | None = None
    seconds: dict[Choice, Quantiles] = field(default_factory=dict)
    left_out: dict[Choice, str] = field(default_factory=dict)  # candidates that do not run here, or are wrong, and why
    skipped: str = ""
    kept: bool = False

    @property
    def wrong(self) -> bool:
        """Whether a candidate was further from float64 than the oracle allows."""
        return any(reason.startswith(_WRONG) for reason in self.left_out.values())

    @property
    def speedup(self) -> Quantiles | None:
        """Of the choice over the default: the medians' ratio, between the ratios of opposite percentiles."""
        if self.choice not in self.seconds or self.default not in self.seconds:
            return None
        default, chosen = self.seconds[self.default], self.seconds[self.choice]
        return Quantiles(default.p20 / chosen.p80, default.median / chosen.median, default.p80 / chosen.p20)


_WRONG = "its result is wrong"


def problems_for(
    shapes: Iterable[tuple[int, int]],
    rows: Iterable[int],
    ranks: Iterable[int],
    dropouts: Iterable[bool],
    dtype: torch.dtype,
) -> list[Problem]:
    """Every step of linears of these shapes (in, out), each problem once: rows count as the next power of two."""
    found = {
        Problem(direction, dtype, next_power_of_2(m), in_features, out_features, r, dropout): None
        for in_features, out_features in shapes
        for r in ranks
        for m in rows
        for dropout in dropouts
        for direction in DIRECTIONS
    }
    return list(found)


def candidates(problem: Problem, target: Target) -> list[Choice]:
    """The default, then every other form, and of the fused one every tile; the tile that `gemm_config` takes goes unnamed."""
    default = default_choice(problem, target)
    width = problem.out_features if problem.direction == "forward" else problem.in_features
    precision, descriptors = matmul_precision(problem.dtype), choices.uses_descriptors(problem, target)
    automatic = gemm_config(problem.rows, width, problem.dtype, precision, target, descriptors)
    tiles = [Choice("fused", tile) for tile in choices.tiles(problem, target) if tile != automatic]
    return [default, *(choice for choice in (*map(Choice, problem.forms), *tiles) if choice != default)]


def decide(seconds: Mapping[Choice, Quantiles], default: Choice) -> Choice:
    """The rule at the head of this file."""
    faster = seconds
    if default in seconds:
        faster = {choice: times for choice, times in seconds.items() if times.p80 < seconds[default].p20}
    return min(faster, key=lambda choice: faster[choice].median, default=default)


@torch._dynamo.forbid_in_graph  # a refusal of our own would be one more graph break, after which Dynamo calls it untraced
def tune(
    problems: Iterable[Problem],
    device: torch.device | str = "cuda",
    *,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.1,
    repeats: int = REPEATS,
    again: bool = False,
    clock: Clock | None = None,
    progress: Callable[[str], object] = lambda what: None,
    finished: Callable[[Result], object] = lambda result: None,
    remark: Callable[[str], object] = warnings.warn,
) -> list[Result]:
    """Measure what was not measured before and store each winner in the cache of `fastlora.choices` as soon as it is known.

    Args:
        adapter_dtype: of A and B; default the problem's dtype.
        dropout_p: the rate of the problems with dropout.
        repeats: timed rounds of each problem.
        again: measure also the problems that the cache holds for this environment and matmul precision.  Otherwise they are
            kept as they are, whatever adapter_dtype, dropout_p and repeats they were measured with.
        clock: times the steps given by choice; default `benchmark.measure`, with CUDA events on a GPU.
        progress: called with what is about to be done.
        finished: called with each result, when its choice is in the cache.
        remark: called with each problem that is skipped and each candidate that is left out; default a warning.

    A problem that runs out of memory is skipped, a candidate that does not compile or whose result is wrong is left out.

    Raises:
        RuntimeError: no CUDA GPU of capability 8.0 or newer; a CUDA graph is being captured; a tracer is at work.  Under
            torch.compile it is Dynamo that refuses, with AssertionError.
        ValueError: a dropout_p that never drops.
        OSError: the cache cannot be written; before anything is measured.
    """
    if threshold(dropout_p) == 0:
        raise ValueError(f"dropout_p must be at least 1/65536, the rate of the problems with dropout, got {dropout_p}")
    device = torch.device(device)
    target = check_device(device)
    choices.store(target, {})
    before = {} if again else choices.stored(target)
    clock = clock or (lambda steps: measure(steps, device, repeats))
    results = []
    for problem in problems:
        if problem in before:
            result = Result(problem, default_choice(problem, target), before[problem], kept=True)
        else:
            shape = problem.rows, problem.in_features, problem.out_features
            p = dropout_p if problem.dropout else 0.0
            case = oracle.Case(shape, problem.r, problem.dtype, adapter_dtype, bias=False, dropout_p=p)
            result = _Trial(problem, case, target, device, progress, remark).result(clock)
            if result.choice is not None:
                choices.store(target, {problem: result.choice})
        results.append(result)
        finished(result)
    return results


@dataclass
class _Trial:
    """One problem: its candidates checked, then timed."""

    problem: Problem
    case: oracle.Case
    target: Target
    device: torch.device
    progress: Callable[[str], object]
    remark: Callable[[str], object]

    def result(self, clock: Clock) -> Result:
        """What `run` returns; where memory does not suffice for that, the problem is skipped."""
        try:
            result = self.run(clock)
        except torch.OutOfMemoryError as error:
            default = default_choice(self.problem, self.target)
            result = Result(self.problem, default, skipped=f"out of memory: {_first_line(error)}")
        if result.choice is None:
            self.remark(f"{describe(self.problem)} is skipped: {result.skipped}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return result

    def run(self, clock: Clock) -> Result:
        """Raises torch.OutOfMemoryError."""
        default, *others = candidates(self.problem, self.target)
        first = draw(self.case, self.device)
        judge = Judge(self.case, first)
        reasons = {choice: self.unsupported_reason(choice, judge) for choice in (default, *others)}
        del judge  # its float64 results would take memory from what is timed
        left_out = {choice: reason for choice, reason in reasons.items() if reason}
        for choice, reason in left_out.items():
            self.remark(f"{describe(self.problem)}: {name_of(choice)} is left out: {reason}")
        right = [choice for choice, reason in reasons.items() if not reason]
        if not right:
            return Result(self.problem, default, left_out=left_out, skipped="no candidate is left")
        self.progress(f"{describe(self.problem)}: timing {len(right)} candidates")
        copies = copies_beyond_cache(first.nbytes, self.device)
        sets = [first, *(draw(self.case, self.device, index) for index in range(1, copies))]
        step = steps_of(LORA_LINEAR, self.case, sets)[self.problem.direction]
        prepared = step if isinstance(step, Prepared) else Prepared(lambda: None, lambda _: step())
        times = clock({choice: self.under(choice, prepared) for choice in right})
        seconds = {choice: quantiles(times[choice]) for choice in right}
        return Result(self.problem, default, decide(seconds, default), seconds, left_out)

    def unsupported_reason(self, choice: Choice, judge: Judge) -> str:
        """Why the candidate cannot be timed; "" where it can."""
        self.progress(f"{describe(self.problem)}: checking {name_of(choice)}")
        try:
            with choices.trying({self.problem: choice}, self.target):
                judge.verify(LORA_LINEAR)
        except WrongResultError as error:
            return f"{_WRONG}: {error}"
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # of the problem, or of the device, which serves nobody after that
        except (TritonError, RuntimeError) as error:  # the compiler's passes fail with RuntimeError
            return f"{type(error).__name__}: {_first_line(error)}"
        return ""

    def under(self, choice: Choice, step: Prepared) -> Prepared:
        """The step with the choice in force, in both halves."""

        def held(function: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object) -> object:
                with choices.trying({self.problem: choice}, self.target):
                    return function(*args)

            return run

        return Prepared(held(step.setup), held(step.run))


def describe(problem: Problem) -> str:
    """A problem in a line."""
    dropout = " with dropout" if problem.dropout else ""
    shape = f"{problem.rows} x {problem.in_features} -> {problem.out_features}"
    return f"{problem.direction} {oracle.SHORT[problem.dtype]} {shape} r={problem.r}{dropout}"


def name_of(choice: Choice) -> str:
    """A form and its tile."""
    tile = choice.config
    return choice.form if tile is None else f"{choice.form} {tile_of(choice)}"


def tile_of(choice: Choice) -> str:
    """M x N x K of the tile, warps and stages, and in how many parts it is stored where that is not one."""
    tile = choice.config
    if tile is None:
        return "auto" if choice.form == "fused" else ""
    parts = f", stored in {tile.store_parts} parts" if tile.store_parts > 1 else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages{parts}"


def check_device(device: torch.device) -> Target:
    """The target of a device to tune on.  Raises RuntimeError as `tune` does."""
    if torch.compiler.is_compiling():
        raise RuntimeError("fastlora.tune measures, which cannot be traced: call it outside of torch.compile and torch.export")
    target = target_of(device) if "triton" in available_backends(device) else None
    if target is None or not target.name:
        raise RuntimeError(f"tuning needs a CUDA GPU of capability 8.0 or newer; the device is {device}")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastlora.tune measures, which a CUDA graph cannot capture: call it before the capture begins")
    return target


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
