"""lora_linear against float64 on every backend: shapes, ranks, dtypes, strides, dropout rates and seeds drawn by hypothesis."""

from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from planned import DTYPES, VIEWS

from fastlora import lora_linear, oracle, reference
from fastlora.oracle import Case

BACKENDS = ("fused", "addmm", "torch")

#: Views of x and dy that may also have other values: a broadcast row.
ROW_VIEWS = VIEWS | {"expanded": lambda t: t[:1].expand(t.shape)}
#: Views of the bias.
VECTOR_VIEWS = {
    "contiguous": lambda t: t,
    "every other": lambda t: torch.stack((t, t), 1).flatten()[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}
#: A 16-bit case is drawn again until its smallest output has 256 elements: tiny cases are judged in float32.
LARGE = st.sampled_from([0, 64, 65, 100, 129])
SIZES = {4: st.one_of(st.integers(0, 20), LARGE), 2: LARGE}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype, adapter_dtype = draw(st.sampled_from(DTYPES))
    sizes = SIZES[dtype.itemsize]
    return Case(
        (draw(sizes), draw(sizes), draw(sizes)),
        rank=draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 130]))),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        bias=draw(st.booleans()),
        dropout_p=draw(st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 0.9))),
        scaling=draw(st.sampled_from([1.0, 0.25, 2.0, 16.0, -0.7])),
        seed=draw(st.integers(0, 1 << 32)),
    )


views = st.fixed_dictionaries(
    {name: st.sampled_from(sorted(VIEWS)) for name in ("weight", "lora_A", "lora_B")}
    | {"bias": st.sampled_from(sorted(VECTOR_VIEWS))}
    | {name: st.sampled_from(sorted(ROW_VIEWS)) for name in ("x", "dy")}
)


@pytest.mark.filterwarnings("ignore:r=.* is above min")  # such ranks are drawn on purpose
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink interpreted kernels takes minutes
@given(case=cases(), views=views)
def test_any_call(backend, case, views):
    functions = {name: (VECTOR_VIEWS if name == "bias" else ROW_VIEWS)[view] for name, view in views.items()}
    oracle.assert_parity(case, backend=backend, views=functions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 5), (3, 1, 40)], ids=str)
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_tiny(backend, shape, dropout_p):
    oracle.assert_parity(Case(shape, rank=3, dropout_p=dropout_p), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_several_tiles_and_splits(backend, dropout_p, dtype, adapter_dtype):
    """More than one tile along every axis, more tiles than programs, and split reductions."""
    case = Case((300, 328, 264), rank=16, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    oracle.assert_parity(case, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 31, 32, 33, 64, 128, 129, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_any_rank(backend, rank, dtype):
    oracle.assert_parity(Case((48, 136, 144), rank=rank, dtype=dtype, dropout_p=0.2), backend=backend)


@pytest.mark.parametrize("exponent", [-40, -20, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_keep_their_range_on_a_float16_base(backend, exponent):
    """dA and dB of float32 adapters do not pass through float16's exponents, however large or small B is."""
    case = Case((64, 96, 80), rank=8, dtype=torch.float16, adapter_dtype=torch.float32, scaling=2.0**-exponent)
    scaled = {"lora_B": lambda B: B * 2.0**exponent}
    oracle.assert_parity(case, backend=backend, views=scaled, outputs=("dA", "dB") if exponent > 0 else None)


@pytest.mark.parametrize("outlier", [2.0**13, torch.inf])
@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["fused", "addmm"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_outlier_costs_the_other_rows_nothing(backend, adapter_dtype, outlier):
    """S is scaled into float16's range by tiles, whose rows may be of different sequences."""
    inputs = oracle.draw(Case((32, 64, 64), 8, torch.float16, adapter_dtype))
    x, W, A, B = inputs.x / 64, torch.zeros_like(inputs.weight), inputs.lora_A, inputs.lora_B
    x[3, 0] = outlier
    exact = reference.lora_linear(*(t.double() for t in (x, W, A, B)))
    found, eager = lora_linear(x, W, A, B, backend=backend), reference.lora_linear(x, W, A, B)
    rows = [row for row in range(32) if row != 3]
    bound = max(2 * max(oracle.relative_error(eager[row], exact[row]) for row in rows), oracle.FLOOR[x.dtype, A.dtype])
    assert max(oracle.relative_error(found[row], exact[row]) for row in rows) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rank_blocks_of_padded_adapters(backend):
    """PEFT's hot-swap pads adapters with zero ranks: an all-zero block must leave the accumulator as it is."""

    def pad(t: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat((16 * t.narrow(axis, 0, 16), torch.zeros_like(t.narrow(axis, 0, 48))), axis)

    case = Case((64, 96, 80), rank=64, dtype=torch.float16, adapter_dtype=torch.float32, scaling=4.0)
    views = {"lora_A": lambda A: pad(A, 0), "lora_B": lambda B: pad(B, 1), "dy": lambda dy: dy / 64}
    oracle.assert_parity(case, backend=backend, views=views)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(backend, dtype):
    case = Case((300, 264, 200), rank=8, dtype=dtype, dropout_p=0.1)
    inputs = oracle.draw(case)
    run = partial(lora_linear, backend=backend)
    first, second = (oracle.evaluate(run, case, inputs, case.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in case.outputs)
