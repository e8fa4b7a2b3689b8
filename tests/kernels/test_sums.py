"""sums.py: the sum of partial results."""

import pytest
import torch
from planned import assert_close

from fastlora.kernels.launch import Result
from fastlora.kernels.sums import plan_sum, sum_partials


def partials(result: Result) -> torch.Tensor:
    return torch.randn((result.parts, *result.shape) if result.parts > 1 else result.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [2, 8, 9, 33])
@pytest.mark.parametrize("shape", [(27, 19), (3, 512), (0, 4)])
def test_parts_are_summed(shape, parts, dtype):
    """Each of two results by the one launch, in its own shape and dtype."""
    results = Result(shape, dtype, parts), Result((5, 300), torch.float32, 3)
    computed = [partials(result) for result in results]
    sums = sum_partials(plan_sum(*results), *computed)
    for result, addends, total in zip(results, computed, sums, strict=True):
        assert total.dtype == result.dtype
        assert_close(total, addends.double().sum(0), total.dtype)


def test_a_result_in_one_part_is_returned_as_it_is():
    whole, split = Result((4, 6), torch.float32), Result((4, 6), torch.float32, 2)
    first, second = partials(whole), partials(split)
    assert sum_partials(plan_sum(whole), first)[0] is first
    kept, total = sum_partials(plan_sum(whole, split), first, second)
    assert kept is first
    assert torch.equal(total, second[0] + second[1])
    assert sum_partials(plan_sum(whole, split), None, second)[0] is None
