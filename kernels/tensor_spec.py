"""What a launcher needs to know of a tensor besides its data."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class TensorSpec(NamedTuple):
    """shape and stride in elements, dtype, and whether the data starts at a multiple of 16 bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        """The spec of `tensor`."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0)

    @classmethod
    def of_each(cls, *tensors: torch.Tensor | None) -> "list[TensorSpec | None]":
        """The spec of each tensor, None for None.  Every call needs them: without `of`, half a µs less for each (timeit)."""
        new = tuple.__new__
        return [None if t is None else new(cls, (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0)) for t in tensors]

    @classmethod
    def new(cls, *shape: int, dtype: torch.dtype) -> "TensorSpec":
        """The spec of a matrix that the launcher allocates."""
        return cls(shape, (shape[1], 1), dtype, True)

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last, of a matrix that is not empty."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def t(self) -> "TensorSpec":
        """The spec of the transposed matrix."""
        return self._replace(shape=self.shape[::-1], stride=self.stride[::-1])


def needs_int64(*specs: TensorSpec | None) -> bool:
    """Whether the offset of an element exceeds 2**31 - 1 in any of the tensors, so that 32-bit offsets would wrap."""
    return any(
        sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True)) >= 2**31
        for spec in specs
        if spec is not None and 0 not in spec.shape
    )


def fits_descriptor(matrix: TensorSpec) -> bool:
    """Whether a tensor descriptor can address a matrix: not empty, unit inner stride, rows that do not overlap, and base and
    rows aligned to 16 bytes."""
    rows, cols = matrix.stride
    aligned = matrix.aligned and rows * matrix.dtype.itemsize % 16 == 0
    return 0 not in matrix.shape and cols == 1 and rows >= matrix.shape[1] and aligned


def row_unit(matrix: TensorSpec) -> int:
    """How many elements of a row fill 16 bytes, where rows begin and end at multiples of them but Triton does not know; else 1.

    Triton specialises integers on multiples of 16 alone: with rows of 4104 elements it would load single ones.
    """
    unit, sizes = 16 // matrix.dtype.itemsize, (matrix.shape[1], matrix.stride[0])
    known = all(size % 16 == 0 for size in sizes)
    return unit if not known and matrix.stride[1] == 1 and all(size % unit == 0 for size in sizes) else 1


@triton.jit
def in_units(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT, so that Triton knows."""
    return n // UNIT * UNIT


@triton.jit
def load_tile(matrix, rows, cols, stride_m, stride_n, M, N):
    """The elements at `rows` and `cols` of a matrix (M, N), 0 outside."""
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    return tl.load(matrix + rows[:, None] * stride_m + cols[None, :] * stride_n, mask=inside, other=0.0)
