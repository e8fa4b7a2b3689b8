"""The oracle: is a result as accurate as eager PyTorch in the same dtypes?

Let ref be the same computation in float64, from the same inputs and the same dropout mask, and e(t) = ‖t − ref‖ / ‖ref‖.
A result passes when

    e(result) <= max(2 · e(eager), floor)

Eager is `fastlora.reference.lora_linear` in the dtypes under test. The floor is a few roundings of the output's dtype.
NaN and infinity never pass. Where ref is zero the result must be zero. A missing gradient or a wrong dtype or shape fails.
Inputs are random, and the LoRA term is as large as the frozen one: a zero gradient or a shifted mask gives an error of order 1.
The error of a few 16-bit elements depends on luck. A 16-bit case is drawn until its smallest output has POOLED_ELEMENTS
elements, and all draws are judged as one. The floor of float32 and of float64 is about 35 roundings, so one draw is enough.

    oracle.assert_parity(oracle.Case((17, 33, 65), rank=3, dtype=torch.bfloat16, dropout_p=0.1), backend="torch")
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import functional, reference
from fastlora.dropout import keep_scale
from fastlora.functional import dropout_mask

POOLED_ELEMENTS = 256
EAGER_FACTOR = 2.0
OUTPUTS = ("y", "dx", "dA", "dB", "dbias")

#: (dtype of base and x, dtype of the output) -> the error that always passes.
FLOOR = {
    (torch.float32, torch.float32): 2e-6,
    (torch.float16, torch.float16): 3e-4,
    (torch.bfloat16, torch.bfloat16): 2e-3,
    (torch.float16, torch.float32): 2e-4,
    (torch.bfloat16, torch.float32): 2e-5,
    (torch.float64, torch.float64): 4e-15,
}
DTYPES = list(FLOOR)[:-1]  # those that every backend computes in
SHORT = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

View = Callable[[Tensor], Tensor]
Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]  # W (N, K), A (r, K), B (N, r), bias (N,) or None
ARGUMENT_OF = {"dx": "x", "dA": "lora_A", "dB": "lora_B", "dbias": "bias"}


@dataclass(frozen=True)
class Case:
    """One call to judge: shape (M, K, N) = (rows of x, in, out), rank, dtypes, dropout, and the seed of its inputs.

    Raises:
        ValueError: a dtype without a floor, an adapter dtype that is neither `dtype` nor float32, or a negative size.
    """

    shape: tuple[int, int, int]
    rank: int = 8
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: dtype
    bias: bool = True
    dropout_p: float = 0.0
    scaling: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(*self.shape, self.rank) < 0:
            raise ValueError(f"shape must be (M, K, N) and rank an int, none negative, got {self.shape}, {self.rank}")
        if (self.dtype, self.adapters) not in FLOOR:
            known = [(str(base), str(adapters)) for base, adapters in FLOOR]
            raise ValueError(f"(dtype, adapter_dtype) must be one of {known}, got ({self.dtype}, {self.adapters})")

    @property
    def adapters(self) -> torch.dtype:
        """The dtype of A and B."""
        return self.adapter_dtype or self.dtype

    @property
    def outputs(self) -> tuple[str, ...]:
        """All of OUTPUTS; without a bias, no dbias."""
        return OUTPUTS if self.bias else OUTPUTS[:-1]

    def dtype_of(self, output: str) -> torch.dtype:
        """The adapters' dtype for dA and dB, x's dtype for the others."""
        return self.adapters if output in ("dA", "dB") else self.dtype

    def __str__(self) -> str:
        dtypes = SHORT[self.dtype] + ("" if self.adapters == self.dtype else f"+{SHORT[self.adapters]}")
        bias = " bias" if self.bias else ""
        return f"{dtypes} {'x'.join(map(str, self.shape))} r={self.rank} p={self.dropout_p:g}{bias}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call and the seed of its mask; dy is the incoming gradient, in y's shape and dtype."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: int

    @property
    def weights(self) -> Weights:
        """W, A, B and bias, in the order of `fastlora.lora_linear`."""
        return self.weight, self.lora_A, self.lora_B, self.bias

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def map(self, function: View) -> "Inputs":
        """function(tensor) in place of every tensor."""
        tensors: dict[str, Any] = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def double(self) -> "Inputs":
        """The same values in float64."""
        return self.map(Tensor.double)


@dataclass(frozen=True)
class Row:
    """The verdict on one output of one case; `note` says why an error is infinite."""

    case: Case
    output: str
    error: float
    eager: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def draw(case: Case, *, index: int = 0, device: torch.device | str = "cpu", views: Mapping[str, View] | None = None) -> Inputs:
    """Set number `index` of random inputs for the case.

    x, dy and bias are standard normal, W and A have variance 1/K, B has variance 1/r: both terms of y are of order one.

    Args:
        views: name of a tensor of Inputs -> a function that returns the tensor to use instead, `{"x": lambda x: x[::2]}` say.
            The view of x may change its rows and dimensions.
    """
    m, k, n = case.shape
    generator = torch.Generator(device).manual_seed((case.seed * 1_000_003 + index) % 2**63)

    def normal(name: str, shape: tuple[int, ...], dtype: torch.dtype, fan_in: int = 1) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).div_(math.sqrt(max(fan_in, 1))).to(dtype)
        return views[name](tensor) if views and name in views else tensor

    seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device))
    x = normal("x", (m, k), case.dtype)
    return Inputs(
        x=x,
        weight=normal("weight", (n, k), case.dtype, k),
        lora_A=normal("lora_A", (case.rank, k), case.adapters, k),
        lora_B=normal("lora_B", (n, case.rank), case.adapters, case.rank),
        bias=normal("bias", (n,), case.dtype) if case.bias else None,
        dy=normal("dy", (*x.shape[:-1], n), case.dtype),
        seed=seed,
    )


def evaluate(function: Callable[..., Tensor], case: Case, inputs: Inputs, outputs: Iterable[str]) -> dict[str, Any]:
    """y and the wanted gradients, for which alone inputs require one; None where there is none or y has not dy's shape."""
    wanted = [output for output in outputs if output != "y"]
    leaves = inputs.map(Tensor.detach)
    needed = [getattr(leaves, ARGUMENT_OF[output]).requires_grad_() for output in wanted]
    y = function(leaves.x, *leaves.weights, scaling=case.scaling, dropout_p=case.dropout_p, seed=inputs.seed)
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and y.requires_grad and y.shape == inputs.dy.shape:
        grads = torch.autograd.grad(y, needed, inputs.dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def relative_error(result: Tensor, ref: Tensor) -> float:
    """‖result − ref‖ / ‖ref‖ in float64; infinite for NaN, infinity or another shape, and for non-zero against zero."""
    if result.shape != ref.shape or not bool(torch.isfinite(result).all()):
        return math.inf
    error, size = float((result.double() - ref.double()).norm()), float(ref.double().norm())
    return error / size if size else math.inf if error else 0.0


def masked_reference(
    mask: Callable[..., Tensor] = dropout_mask, scale: Callable[[float], float] = keep_scale
) -> Callable[..., Tensor]:
    """`reference.lora_linear` called like `lora_linear`, with mask(seed, rows, cols, p, device=...).

    scale(p) is the factor that the function under test applies to kept elements: 1/(1 − p) for torch's own dropout.
    """

    def lora_linear(x: Tensor, *weights: Any, scaling: float, dropout_p: float, seed: int) -> Tensor:
        def drop(x: Tensor) -> Tensor:
            cols = x.shape[-1]
            kept = mask(seed, x.numel() // max(cols, 1), cols, dropout_p, device=x.device).view(x.shape)
            return torch.where(kept, x * scale(dropout_p), 0.0)

        return reference.lora_linear(x, *weights, scaling=scaling, dropout=drop if dropout_p > 0 else None)

    return lora_linear


def check(
    case: Case,
    function: Callable[..., Tensor] | None = None,
    *,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    views: Mapping[str, View] | None = None,
    outputs: Iterable[str] | None = None,
    expected: Callable[..., Tensor] | None = None,
) -> list[Row]:
    """Judge `function` on `case`: one row for each output, in the order of OUTPUTS.

    Args:
        function: called as function(x, weight, lora_A, lora_B, bias, *, scaling, dropout_p, seed) and differentiated by
            autograd; default `fastlora.lora_linear` on `backend` (None: the one it chooses).
        device: where the inputs live and the function runs.  Their values depend on its kind.
        views: other strides for the inputs, see `draw`; the reference sees the same values.
        outputs: what to compute, default case.outputs; the inputs of the other gradients do not require one.
        expected: called like `function`, in float64 and in the case's dtypes; default `masked_reference()`.

    Raises:
        ValueError: both `function` and `backend` given, or an output that the case does not have.
    """
    if function is not None and backend is not None:
        raise ValueError(f"backend={backend!r} selects how fastlora.lora_linear runs; it cannot be given with a function")
    outputs = case.outputs if outputs is None else tuple(outputs)
    if unknown := set(outputs) - set(case.outputs):
        raise ValueError(f"outputs must be among {case.outputs} for this case, got {sorted(unknown)}")
    drawn = partial(draw, case, device=device, views=views)
    sets = [drawn()]
    if case.dtype.itemsize == 2:
        sizes = (getattr(sets[0], ARGUMENT_OF.get(output, "dy")).numel() for output in outputs)
        smallest = min(filter(None, sizes), default=POOLED_ELEMENTS)
        sets += [drawn(index=index) for index in range(1, math.ceil(POOLED_ELEMENTS / smallest))]
    function = function or partial(functional.lora_linear, backend=backend)
    return Judge(case, sets, outputs, expected or masked_reference()).rows(function)


class Judge:
    """Judges functions on the same sets of inputs.  The eager and the float64 results of `expected` are computed once."""

    def __init__(self, case: Case, sets: Sequence[Inputs], outputs: Iterable[str], expected: Callable[..., Tensor]) -> None:
        self.case, self.sets, self.outputs = case, sets, tuple(outputs)
        self.eager = self._results(expected, sets)
        self.refs = self._results(expected, [inputs.double() for inputs in sets])

    def rows(self, function: Callable[..., Tensor]) -> list[Row]:
        """The verdict on each output; all sets are judged as one."""
        results = self._results(function, self.sets)
        return [judge(self.case, name, results[name], self.eager[name], self.refs[name]) for name in self.outputs]

    def _results(self, function: Callable[..., Tensor], sets: Sequence[Inputs]) -> dict[str, Any]:
        found = [evaluate(function, self.case, inputs, self.outputs) for inputs in sets]
        if len(found) == 1:
            return found[0]
        columns = {name: [results[name] for results in found] for name in self.outputs}
        return {name: None if any(t is None for t in column) else torch.stack(column) for name, column in columns.items()}


def judge(case: Case, output: str, result: Tensor | None, eager: Tensor, ref: Tensor) -> Row:
    """The verdict on one output, given the eager and the float64 result.  Where eager overflows, the floor is the bound."""
    dtype, error, note = case.dtype_of(output), math.inf, ""
    if result is None:
        note = "no gradient"
    elif result.dtype != dtype or result.shape != ref.shape:
        note = f"{result.dtype} {tuple(result.shape)} instead of {dtype} {tuple(ref.shape)}"
    elif not bool(torch.isfinite(result).all()):
        note = "not finite"
    elif (error := relative_error(result, ref)) == math.inf:
        note = "not zero"
    floor, eager_error = FLOOR[case.dtype, dtype], relative_error(eager, ref)
    bound = max(EAGER_FACTOR * eager_error, floor) if math.isfinite(eager_error) else floor
    return Row(case, output, error, eager_error, bound, note)


def assert_parity(case: Case, function: Callable[..., Tensor] | None = None, **options: Any) -> list[Row]:
    """`check` with the same arguments; raises AssertionError with a table of the rows when one does not pass."""
    rows = check(case, function, **options)
    if not all(row.passed for row in rows):
        raise AssertionError(f"{case}\n{table(rows)}")
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows as plain text."""
    lines = [f"{'output':<7}{'error':>10}{'eager':>10}{'bound':>10}  verdict"]
    for row in rows:
        verdict = "ok" if row.passed else f"OVER {row.note}".rstrip()
        lines.append(f"{row.output:<7}{row.error:>10.2e}{row.eager:>10.2e}{row.bound:>10.2e}  {verdict}")
    return "\n".join(lines)
