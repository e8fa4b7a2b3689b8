"""A frozen weight stored packed, and the table entry that says how the layers of one library keep theirs."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What the dense weight can be made in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Scheme(NamedTuple):
    """How packed bits are to be read: the part of a quantised weight that is no tensor."""

    kind: str  # a key of some `Family.dense`
    shape: tuple[int, int]  # (out, in)
    options: tuple[int, ...] = ()  # block sizes, bits: what `kind` needs


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight W (out, in), stored packed.

    Attributes:
        packed: the codes, in the shape and dtype in which their library stores them.
        statistics: the scales, and what else `scheme.kind` needs.
        scheme: kind, shape and options.
        compute_dtype: what the layer that holds W computes in; None: x's dtype.
    """

    packed: Tensor
    statistics: tuple[Tensor, ...]
    scheme: Scheme
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.scheme.shape

    @property
    def device(self) -> torch.device:
        """Where the packed weight lives."""
        return self.packed.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`: float32, float16 or bfloat16."""
        return dequantize(self.scheme, self.packed, self.statistics, dtype)


def dequantize(
    scheme: Scheme, packed: Tensor, statistics: Sequence[Tensor], dtype: torch.dtype, after: Tensor | None = None
) -> Tensor:
    """W (out, in) in `dtype`, from the parts of a `QuantizedWeight`; under torch.compile not before `after` exists."""
    return torch.ops.fastlora.dequantize(packed, statistics, *scheme, dtype, after)


class Family(NamedTuple):
    """The layers of one library.

    `read(linear)` is the packed weight of a layer; or why it cannot be read from outside, as the end of a sentence about the
    layer; or None where the layer is not of this family.  `dense[scheme.kind](weight, dtype)` is W (out, in), contiguous.
    """

    read: Callable[[Any], QuantizedWeight | str | None]
    dense: Mapping[str, Callable[[QuantizedWeight, torch.dtype], Tensor]]
    casts: bool = False  # the layer casts x to its compute dtype, outside autocast's reach, and its result to x's dtype
    few_rows: int = 0  # up to so many rows, without a gradient and off the CPU, a kernel of the library reads the packed weight


def is_layer(linear: nn.Module, *kinds: str) -> bool:
    """Whether `linear` is of one of `kinds`, "module:class", with the forward of that class; none of them is imported."""
    for kind in kinds:
        module, _, name = kind.partition(":")
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and isinstance(linear, cls) and type(linear).forward is cls.forward:
            return True
    return False
