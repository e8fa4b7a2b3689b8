"""tensor_spec.py: which tensors need 64-bit offsets, and which a tensor descriptor can address."""

import pytest
import torch

from fastlora.kernels.tensor_spec import TensorSpec, fits_descriptor, needs_int64, row_unit


def test_specs():
    """`of_each` gives what `of` gives; `new` is the spec of a fresh matrix and `t` that of the transposed one."""
    matrix, shifted = torch.empty(6, 8), torch.empty(49)[1:].view(6, 8)
    assert TensorSpec.of_each(matrix, None, shifted.t()) == [TensorSpec.of(matrix), None, TensorSpec.of(shifted.t())]
    assert TensorSpec.of(matrix) == TensorSpec.new(6, 8, dtype=torch.float32) == ((6, 8), (8, 1), torch.float32, True)
    assert TensorSpec.of(shifted).t() == TensorSpec.of(shifted.t()) == ((8, 6), (1, 8), torch.float32, False)


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((1 << 16, 1 << 15), (1 << 15, 1), False),
        ((1 << 16, (1 << 15) + 1), ((1 << 15) + 1, 1), True),
        ((2, 8), ((1 << 31) - 7, 1), True),
        ((2, 8), ((1 << 31) - 8, 1), False),
        ((0, 8), (1 << 40, 1), False),
        ((1 << 20, 1 << 20), (0, 0), False),
    ],
)
def test_needs_int64_looks_at_the_extent(shape, stride, expected):
    spec = TensorSpec(shape, stride, torch.float32, True)
    assert needs_int64(spec) == needs_int64(None, TensorSpec.new(2, 2, dtype=torch.float32), spec) == expected


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(4, 64, dtype=torch.bfloat16), True),
        (torch.empty(4, 60, dtype=torch.bfloat16), False),
        (torch.empty(4, 60), True),
        (torch.empty(64, 4).t(), False),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, ::2], False),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, 8:72], True),
        (torch.empty(4, 128, dtype=torch.bfloat16)[:, 1:65], False),
        (torch.empty(8, 64)[::2], True),
        (torch.empty(1, 64).expand(4, 64), False),
        (torch.empty(128).unfold(0, 64, 4), False),
        (torch.empty(0, 64), False),
    ],
)
def test_fits_descriptor(tensor, expected):
    assert fits_descriptor(TensorSpec.of(tensor)) == expected


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(4, 4096, dtype=torch.bfloat16), 1),  # Triton knows multiples of 16
        (torch.empty(4, 4104, dtype=torch.bfloat16), 8),
        (torch.empty(4, 4104), 4),
        (torch.empty(4, 4100), 4),
        (torch.empty(4, 4100, dtype=torch.bfloat16), 1),
        (torch.empty(4, 24, dtype=torch.bfloat16)[:, :20], 1),
        (torch.empty(4, 20, dtype=torch.bfloat16)[:, :16], 1),
        (torch.empty(24, 24, dtype=torch.bfloat16).t(), 1),
    ],
)
def test_row_unit(tensor, expected):
    assert row_unit(TensorSpec.of(tensor)) == expected
