"""The oracle: is a result as accurate as the plain computation in the same dtypes?

With e(t) = ‖t − ref‖ / ‖ref‖, taken in float64 against a float64 computation from the same inputs and the same dropout mask,
a result passes when

    e(result) <= max(2 · e(eager), floor)

where eager is `fastlora.reference.lora_linear` in the dtypes under test, and the floor is a few roundings of the output's
dtype.  NaN and infinity never pass, where ref is zero the result must be zero, and a missing gradient or one of another dtype
or shape fails.  Inputs are random and never zero, B included, and scaled so that the LoRA term weighs as much as the
frozen one: a zero gradient, a dropped term or a shifted mask is an error of order one.

A norm over few elements is luck: one correctly rounded bfloat16 number may be off by 3.9e-3 where eager happened to hit.
So a 16-bit case is drawn again, with other inputs and another mask, until its smallest output has POOLED_ELEMENTS elements
and the draws are judged as one vector: e = sqrt(Σ ‖t − ref‖²) / sqrt(Σ ‖ref‖²).  In float32 the floor is 33 roundings,
which no luck exceeds.

    oracle.assert_parity(oracle.Case((17, 33, 65), rank=3, dtype=torch.bfloat16, dropout_p=0.1), backend="torch")
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
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
}
SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

View = Callable[[Tensor], Tensor]
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
            raise ValueError(
                f"(dtype, adapter_dtype) must be one of {[(str(a), str(b)) for a, b in FLOOR]}, "
                f"got ({self.dtype}, {self.adapters})"
            )

    @property
    def adapters(self) -> torch.dtype:
        """The dtype of A and B."""
        return self.adapter_dtype or self.dtype

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that exist: all of OUTPUTS, less dbias without a bias."""
        return OUTPUTS if self.bias else OUTPUTS[:-1]

    def dtype_of(self, output: str) -> torch.dtype:
        """dA and dB come in the adapters' dtype, the others in x's."""
        return self.adapters if output in ("dA", "dB") else self.dtype

    def __str__(self) -> str:
        dtypes = SHORT[self.dtype] + ("" if self.adapters == self.dtype else f"+{SHORT[self.adapters]}")
        bias = " bias" if self.bias else ""
        return f"{dtypes} {'x'.join(map(str, self.shape))} r={self.rank} p={self.dropout_p:g}{bias}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; dy is the incoming gradient, in y's shape and dtype."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: int

    def double(self) -> "Inputs":
        """The same values in float64."""
        x, weight, A, B, dy = (t.double() for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))
        return Inputs(x, weight, A, B, None if self.bias is None else self.bias.double(), dy, self.seed)


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
        return math.isfinite(self.error) and self.error <= self.bound


def draw(case: Case, *, index: int = 0, device: torch.device | str = "cpu", views: Mapping[str, View] | None = None) -> Inputs:
    """Draw number `index` of the case's inputs: the same values on every device.

    x, dy and bias are standard normal, W and A have variance 1/K, B has 1/r: both terms of y are of order one.  `views` maps
    the name of a tensor of Inputs to a function that returns the one to use in its place, `{"x": lambda x: x[::2]}` say; that
    of x may change the number of rows and of dimensions.
    """
    m, k, n = case.shape
    generator = torch.Generator().manual_seed((case.seed * 1_000_003 + index) % 2**63)

    def normal(name: str, shape: tuple[int, ...], dtype: torch.dtype, fan_in: int = 1) -> Tensor:
        tensor = torch.randn(shape, generator=generator) / math.sqrt(max(fan_in, 1))
        tensor = tensor.to(device=device, dtype=dtype)
        return views[name](tensor) if views and name in views else tensor

    seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator))
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


def evaluate(function: Callable[..., Tensor], case: Case, inputs: Inputs, outputs: Iterable[str]) -> dict[str, Tensor | None]:
    """y and the wanted gradients of `function`; None where autograd returned none.  No other input requires a gradient."""
    wanted = [output for output in outputs if output != "y"]
    leaves = {name: getattr(inputs, name) for name in ("x", "weight", "lora_A", "lora_B", "bias")}
    for output in wanted:
        name = ARGUMENT_OF[output]
        leaves[name] = leaves[name].detach().requires_grad_()
    y = function(*leaves.values(), scaling=case.scaling, dropout_p=case.dropout_p, seed=inputs.seed)
    results: dict[str, Tensor | None] = {"y": y.detach()}
    if wanted:
        grads = torch.autograd.grad(y, [leaves[ARGUMENT_OF[o]] for o in wanted], inputs.dy, allow_unused=True)
        results.update(zip(wanted, grads, strict=True))
    return {output: results[output] for output in outputs}


class _Pool:
    """Σ ‖t − ref‖² and Σ ‖ref‖² over the draws of one output."""

    def __init__(self) -> None:
        self.error = self.reference = 0.0
        self.note = ""

    def add(self, result: Tensor | None, dtype: torch.dtype, ref: Tensor) -> None:
        """Add one draw; `result` must have the dtype given and ref's shape."""
        if result is None:
            self.note = "no gradient"
        elif result.dtype != dtype or result.shape != ref.shape:
            self.note = f"{result.dtype} {tuple(result.shape)} instead of {dtype} {tuple(ref.shape)}"
        elif not bool(torch.isfinite(result).all()):
            self.note = "not finite"
        else:
            self.error += float((result.double() - ref).square().sum())
            self.reference += float(ref.square().sum())

    @property
    def relative(self) -> float:
        """e of all draws; infinite when one of them was no result at all, or not zero where ref is."""
        if self.note or (self.reference == 0.0 and self.error > 0.0):
            return math.inf
        return math.sqrt(self.error / self.reference) if self.reference else 0.0


def relative_error(result: Tensor, ref: Tensor) -> float:
    """‖result − ref‖ / ‖ref‖ in float64; infinite for NaN, infinity or another shape, and for non-zero against zero."""
    pool = _Pool()
    pool.add(result, result.dtype, ref.double())
    return pool.relative


def masked_reference(
    mask: Callable[..., Tensor] = dropout_mask, scale: Callable[[float], float] = keep_scale
) -> Callable[..., Tensor]:
    """`reference.lora_linear` under the call of `lora_linear`: mask(seed, rows, cols, p, device=...) stands for the seed.

    `scale` is the factor that the function under test puts on kept elements: 1/(1 − p) for torch's own dropout.
    """

    def lora_linear(x: Tensor, *tensors: Any, scaling: float, dropout_p: float, seed: int) -> Tensor:
        keep_mask = None
        if dropout_p > 0:
            cols = x.shape[-1]
            keep_mask = mask(seed, x.numel() // max(cols, 1), cols, dropout_p, device=x.device)
            scaling *= scale(dropout_p) / (keep_scale(dropout_p) or 1.0)
        return reference.lora_linear(x, *tensors, scaling=scaling, dropout_p=dropout_p, keep_mask=keep_mask)

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
        device: where the inputs live and the function runs.
        views: other strides for the inputs, see `draw`; the reference sees the same values.
        outputs: what to compute, default case.outputs; the inputs of the other gradients do not require one.
        expected: the truth, called as `function`; it runs in float64 and in the case's dtypes.
            Default `masked_reference()`.

    Raises:
        ValueError: both `function` and `backend` given, or an output that the case does not have.
    """
    if function is None:
        from fastlora.functional import lora_linear

        function = partial(lora_linear, backend=backend)
    elif backend is not None:
        raise ValueError(f"backend={backend!r} chooses how fastlora.lora_linear runs; it cannot be given with a function")
    outputs = case.outputs if outputs is None else tuple(outputs)
    if unknown := set(outputs) - set(case.outputs):
        raise ValueError(f"outputs must be among {case.outputs} for this case, got {sorted(unknown)}")
    expected = expected or masked_reference()

    pools = {output: (_Pool(), _Pool()) for output in outputs}
    index, draws = 0, 1
    while index < draws:
        inputs = draw(case, index=index, device=device, views=views)
        refs = {name: ref for name, ref in evaluate(expected, case, inputs.double(), outputs).items() if ref is not None}
        eager = evaluate(expected, case, inputs, outputs)
        results = evaluate(function, case, inputs, outputs)
        for output, (pool, eager_pool) in pools.items():
            pool.add(results[output], case.dtype_of(output), refs[output])
            eager_pool.add(eager[output], case.dtype_of(output), refs[output])
        index += 1
        if case.dtype.itemsize == 2:
            smallest = min((ref.numel() for ref in refs.values() if ref.numel()), default=POOLED_ELEMENTS)
            draws = math.ceil(POOLED_ELEMENTS / smallest)
    return [_row(case, output, *pools[output]) for output in outputs]


def judge(case: Case, output: str, result: Tensor | None, eager: Tensor, ref: Tensor) -> Row:
    """The verdict on one output of one draw, beside the eager computation of it; ref is float64."""
    pool, eager_pool = _Pool(), _Pool()
    pool.add(result, case.dtype_of(output), ref)
    eager_pool.add(eager, case.dtype_of(output), ref)
    return _row(case, output, pool, eager_pool)


def _row(case: Case, output: str, pool: _Pool, eager: _Pool) -> Row:
    """An eager computation that overflows sets no bound: the floor then stands alone."""
    floor = FLOOR[case.dtype, case.dtype_of(output)]
    bound = max(EAGER_FACTOR * eager.relative, floor) if math.isfinite(eager.relative) else floor
    note = "not zero" if pool.relative == math.inf and not pool.note else pool.note
    return Row(case, output, pool.relative, eager.relative, bound, note)


def assert_parity(case: Case, function: Callable[..., Tensor] | None = None, **options: Any) -> list[Row]:
    """`check` with the same arguments, raising AssertionError with a table of the rows when one does not pass."""
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
