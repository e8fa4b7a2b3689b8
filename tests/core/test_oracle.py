"""The oracle: its inputs, its bound, its verdicts and its refusals.  test_mutants.py shows that it sees every fault."""

import math

import pytest
import torch

from fastlora import functional, oracle, reference
from fastlora.oracle import Case


def truth(*tensors, **options):
    return oracle.masked_reference()(*tensors, **options)


def test_views_reach_the_function_as_they_are():
    views = {
        "x": lambda x: x.view(3, 4, -1)[:, :1].expand(3, 4, 10),
        "weight": lambda w: w.t().contiguous().t(),
        "lora_A": lambda a: a[::2],
        "lora_B": lambda b: b[:, ::2],
        "dy": lambda dy: dy[:, :1].expand_as(dy),
    }
    case, seen = Case((12, 10, 14), rank=4, dropout_p=0.5), {}

    def spy(x, weight, lora_A, lora_B, bias, **options):
        seen.update(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
        y = functional.lora_linear(x, weight, lora_A, lora_B, bias, backend="torch", **options)
        y.register_hook(lambda dy: seen.update(dy=dy))
        return y

    oracle.assert_parity(case, spy, views=views)
    inputs = oracle.draw(case, views=views)
    assert {name: tensor.stride() for name, tensor in seen.items()} == {n: getattr(inputs, n).stride() for n in views}


def test_only_wanted_gradients_are_asked_for():
    case = Case((5, 6, 7), rank=2, dropout_p=0.1)

    def spy(*tensors, **options):
        assert [tensor.requires_grad for tensor in tensors] == [False, False, True, False, False]
        return truth(*tensors, **options)

    assert [row.output for row in oracle.check(case, spy, outputs=("y", "dA"))] == ["y", "dA"]
    assert [row.output for row in oracle.check(case, truth, outputs=("y",))] == ["y"]


@pytest.mark.parametrize(("dtype", "output"), oracle.DTYPES, ids=str)
def test_the_bound_is_twice_eager_or_the_floor(dtype, output):
    case = Case((32, 64, 48), rank=8, dtype=dtype, adapter_dtype=output, dropout_p=0.1)
    for row in oracle.check(case, truth):
        assert row.error == row.eager > 0
        assert row.bound == max(2 * row.eager, oracle.FLOOR[dtype, case.dtype_of(row.output)])


@pytest.mark.parametrize(("relative", "passes"), [(1.5e-6, True), (4e-6, False)])
def test_an_error_over_the_floor_is_seen(relative, passes):
    """A float32 result off by a constant factor, which eager is not."""

    def off(*tensors, **options):
        return truth(*tensors, **options) * (1 + relative)

    rows = oracle.check(Case((32, 64, 48), rank=8), off)
    assert [row.passed for row in rows] == [passes] * len(rows)


@pytest.mark.parametrize(
    ("change", "note", "failing"),
    [
        (lambda y: y.double(), "torch.float64", {"y"}),
        (lambda y: y[:-1], "(4, 7)", {"y"}),
        (lambda y: y.index_fill(0, torch.tensor([0]), math.nan), "not finite", {"y"}),
        (lambda y: y + math.inf, "not finite", {"y"}),
        (lambda y: y.detach().requires_grad_(), "no gradient", {"dx", "dA", "dB", "dbias"}),
    ],
    ids=["dtype", "shape", "nan", "infinity", "no gradient"],
)
def test_what_is_no_result_at_all(change, note, failing):
    case = Case((5, 6, 7), rank=2)
    outputs = case.outputs if failing != {"y"} else ("y",)
    rows = oracle.check(case, lambda *tensors, **options: change(truth(*tensors, **options)), outputs=outputs)
    assert {row.output for row in rows if not row.passed} == failing
    assert all(note in row.note and row.error == math.inf for row in rows if not row.passed)


def test_an_overflow_of_eager_sets_no_bound():
    """Where eager leaves float16's range, the floor alone decides: it does not excuse every result."""
    case = Case((4, 64, 64), rank=4, dtype=torch.float16)

    def overflowing(x, *tensors, **options):
        y = truth(x, *tensors, **options)
        return y if y.dtype == torch.float64 else y * 1e5

    (row,) = oracle.check(case, lambda *t, **o: truth(*t, **o) * 1.01, outputs=("y",), expected=overflowing)
    assert row.eager == math.inf
    assert row.bound == oracle.FLOOR[torch.float16, torch.float16]
    assert not row.passed


def test_relative_error():
    ref = torch.tensor([3.0, 4.0])
    assert oracle.relative_error(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert oracle.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    for result in (torch.tensor([math.nan, 4.0]), torch.tensor([math.inf, 4.0]), torch.ones(3)):
        assert oracle.relative_error(result, ref) == math.inf
    assert oracle.relative_error(torch.full((2,), 1e-30), torch.zeros(2)) == math.inf


def test_one_lucky_number_decides_nothing():
    """Rounding to bfloat16 twice is no fault: judged on a single number it sometimes would be, pooled it never is."""

    def twice_rounded(*tensors, **options):
        exact = truth(*(tensor.double() for tensor in tensors), **options)
        return (exact * 3).bfloat16() / 3

    cases = [Case((1, 8, 1), rank=2, dtype=torch.bfloat16, seed=seed) for seed in (9, 19, 29)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "POOLED_ELEMENTS", 1)
        assert any(not oracle.check(case, twice_rounded, outputs=("y",))[0].passed for case in cases)
    assert all(oracle.check(case, twice_rounded, outputs=("y",))[0].passed for case in cases)


def test_inputs_are_random_and_repeatable():
    case = Case((9, 16, 12), rank=4, dtype=torch.float16, adapter_dtype=torch.float32)
    first, again, other = oracle.draw(case), oracle.draw(case), oracle.draw(case, index=1)
    for tensor in ("x", "weight", "lora_A", "lora_B", "bias", "dy"):
        values = getattr(first, tensor)
        assert values.count_nonzero() == values.numel()
        assert torch.equal(values, getattr(again, tensor))
        assert not torch.equal(values, getattr(other, tensor))
    assert first.seed == again.seed != other.seed
    dtypes = [tensor.dtype for tensor in (first.x, first.bias, first.lora_A, first.lora_B)]
    assert dtypes == [torch.float16] * 2 + [torch.float32] * 2


def test_both_terms_weigh_the_same():
    """Otherwise a wrong LoRA term could hide below the floor of a large frozen one."""
    inputs = oracle.draw(Case((64, 256, 128), rank=8)).double()
    frozen = inputs.x @ inputs.weight.t()
    bypass = inputs.x @ inputs.lora_A.t() @ inputs.lora_B.t()
    assert 0.7 < float(bypass.norm() / frozen.norm()) < 1.4


def test_the_message_is_a_table():
    case = Case((5, 6, 7), rank=2)

    def zero(*tensors, **options):
        return truth(*tensors, **options) * 0.0

    message = r"f32 5x6x7 r=2 p=0 bias\noutput +error +eager +bound  verdict\ny +1\.00e\+00 .* OVER"
    with pytest.raises(AssertionError, match=message):
        oracle.assert_parity(case, zero)


def test_the_eager_computation_is_the_reference():
    inputs = oracle.draw(Case((5, 6, 7), rank=2))
    tensors = inputs.x, *inputs.weights
    assert torch.equal(truth(*tensors, scaling=2.0, dropout_p=0.0, seed=1), reference.lora_linear(*tensors, scaling=2.0))
    half = reference.lora_linear(*tensors, scaling=2.0, dropout=lambda x: x / 2)
    assert torch.equal(half, reference.lora_linear(*tensors, scaling=1.0))
    with pytest.raises(ValueError, match="either dropout, or dropout_p"):
        reference.lora_linear(*tensors, dropout=torch.relu, dropout_p=0.1)


MIXED = {"dtype": torch.float64, "adapter_dtype": torch.float32}


@pytest.mark.parametrize(
    "fields", [{"shape": (1, 2)}, {"shape": (1, 2, -3)}, {"rank": -1}, {"dtype": torch.int8}, MIXED], ids=str
)
def test_impossible_cases_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        Case(**{"shape": (1, 2, 3), **fields})


def test_contradicting_options_are_refused():
    case = Case((2, 3, 4), rank=1, bias=False)
    with pytest.raises(ValueError, match="backend='torch'"):
        oracle.check(case, truth, backend="torch")
    with pytest.raises(ValueError, match=r"\['dbias'\]"):
        oracle.check(case, truth, outputs=("y", "dbias"))
