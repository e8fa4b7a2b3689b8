"""lora_linear against float64 on every backend: shapes, ranks, dtypes, strides, dropout rates and seeds drawn by hypothesis."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from planned import run_gemm

from fastlora import lora_linear, oracle
from fastlora.kernels import launch, target
from fastlora.kernels.config import GemmConfig
from fastlora.oracle import Case

BACKENDS = ("fused", "addmm", "torch")
DTYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]

#: Views of a (rows, cols) matrix with the same shape and values, each unlike a freshly allocated one.
VIEWS = {
    "contiguous": lambda t: t,
    "every other row": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    "every other column": lambda t: torch.stack((t, t), 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) if t.numel() else t,
    "within a wider row": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
}
#: Those of x and dy that may also have other values: a broadcast row.
ROW_VIEWS = VIEWS | {"expanded": lambda t: t[:1].expand(t.shape)}
#: Those of the bias.
VECTOR_VIEWS = {
    "contiguous": lambda t: t,
    "every other": lambda t: torch.stack((t, t), 1).flatten()[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}

#: A 16-bit case is drawn again until its smallest output has 256 elements, so that tiny ones cost a thousand launches: a few of
#: them are in test_tiny, here they start at 8.
LARGE = st.sampled_from([0, 16, 31, 64, 65, 100, 129, 264])
SIZES = {4: st.one_of(st.integers(1, 20), LARGE), 2: st.one_of(st.integers(8, 20), LARGE)}


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
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink interpreted kernels takes minutes
@given(case=cases(), views=views)
def test_any_call(backend, case, views):
    oracle.assert_parity(
        case,
        backend=backend,
        views={name: (VECTOR_VIEWS if name == "bias" else ROW_VIEWS)[view] for name, view in views.items()},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 40, 5), (3, 1, 40)], ids=str)
@pytest.mark.filterwarnings("ignore:r=.* is above min")
def test_tiny(backend, shape):
    oracle.assert_parity(Case(shape, rank=3, dtype=torch.bfloat16, dropout_p=0.3), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_several_tiles_and_splits(backend, dropout_p, dtype, adapter_dtype):
    """Large enough for more than one tile along every axis, more tiles than programs, and split reductions."""
    case = Case((330, 600, 328), rank=16, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    oracle.assert_parity(case, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 31, 32, 33, 64, 128, 129, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rank(backend, rank, dtype):
    oracle.assert_parity(Case((48, 520, 528), rank=rank, dtype=dtype, dropout_p=0.2), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_pointer_and_descriptor_paths(monkeypatch, capability, dtype):
    """Below capability 9.0 the GEMMs read through pointers; from 9.0 aligned operands go through descriptors."""
    paths = []
    run = launch.launch

    def watch(plan, *args):
        paths.append(plan.options.get("DESCRIPTORS"))
        run(plan, *args)

    monkeypatch.setattr(launch, "launch", watch)
    monkeypatch.setattr(target, "INTERPRETER", replace(target.INTERPRETER, capability=capability))
    oracle.assert_parity(Case((96, 136, 72), rank=8, dtype=dtype, dropout_p=0.1), backend="fused")
    assert {path for path in paths if path is not None} == {capability >= 90}


@pytest.mark.parametrize("exponent", [-40, -20, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_keep_their_range_on_a_float16_base(backend, exponent):
    """dA and dB of float32 adapters do not pass through float16's exponents, however large or small B is."""
    case = Case((64, 96, 80), rank=8, dtype=torch.float16, adapter_dtype=torch.float32, scaling=2.0**-exponent)
    scaled = {"lora_B": lambda B: B * 2.0**exponent}
    oracle.assert_parity(case, backend=backend, views=scaled, outputs=("dA", "dB") if exponent > 0 else None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rank_blocks_of_padded_adapters(backend):
    """PEFT's hot-swap pads adapters with zero ranks: an all-zero block must leave the accumulator as it is."""

    def pad(t: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat((16 * t.narrow(axis, 0, 16), torch.zeros_like(t.narrow(axis, 0, 48))), axis)

    case = Case((64, 96, 80), rank=64, dtype=torch.float16, adapter_dtype=torch.float32, scaling=4.0)
    views = {"lora_A": lambda A: pad(A, 0), "lora_B": lambda B: pad(B, 1), "dy": lambda dy: dy / 64}
    oracle.assert_parity(case, backend=backend, views=views)


@pytest.mark.parametrize("transposed", [False, True])
def test_fan_in_fan_out_weight(transposed):
    """A weight stored (in, out) goes through descriptors as well, in both GEMMs."""
    P, Q = torch.randn(40, 64), torch.randn(64, 48)
    U, V = torch.randn(40, 4), torch.randn(4, 48)
    stored = Q.t().contiguous().t() if transposed else Q
    result = run_gemm(P, stored, U, V, alpha=0.5)
    expected = P.double() @ Q.double() + 0.5 * U.double() @ V.double()
    assert oracle.relative_error(result, expected) <= oracle.FLOOR[torch.float32, torch.float32]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_tile_stored_in_parts(parts, monkeypatch):
    """The parts of a tile land where the whole one does, at a ragged edge too."""
    seen, run = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda plan, *args: seen.append(plan.options["STORE_PARTS"]) or run(plan, *args))
    P, Q, U, V = torch.randn(70, 64), torch.randn(64, 136), torch.randn(70, 4), torch.randn(4, 136)
    whole = GemmConfig(64, 64, 16, 16, 4, 3)
    results = [run_gemm(P, Q, U, V, alpha=0.5, config=config) for config in (whole, replace(whole, store_parts=parts))]
    assert seen == [1, parts]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(backend, dtype):
    case = Case((300, 264, 200), rank=8, dtype=dtype, dropout_p=0.1)
    inputs = oracle.draw(case)
    run = partial(lora_linear, backend=backend)
    first, second = (oracle.evaluate(run, case, inputs, case.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in case.outputs)
