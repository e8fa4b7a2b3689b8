"""Adapters on chosen slices of a linear's output: the enable_lora of loralib's MergedLinear.

The out features are len(enable_lora) slices of equal width s.  Each of the n enabled slices has a pair of factors of its own:

    y[slice j] = x W[slice j]ᵀ + scaling · drop(x) Aᵢᵀ Bᵢᵀ     where slice j is the i-th enabled one
    y[slice j] = x W[slice j]ᵀ                                 elsewhere

loralib stores the pairs one after the other, A (n · r, in) and B (n · s, r).  That is one adapter of rank n · r whose B is the
block matrix below, which is how one call of `lora_linear` computes it and how PEFT's files hold it:

    enable_lora = [True, False, True]:   B = [[B₀, 0], [0, 0], [0, B₁]]   (out, n · r)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EnableLora = Sequence[bool]


def check_enabled(enable_lora: EnableLora, name: str = "enable_lora") -> None:
    """`enable_lora` is a list of bools of which one is True.  Raises TypeError or ValueError."""
    if not isinstance(enable_lora, list | tuple) or not all(isinstance(enabled, bool) for enabled in enable_lora):
        raise TypeError(f"{name} must be a list of bools, one for each slice of the output, got {enable_lora!r}")
    if not any(enable_lora):
        raise ValueError(f"{name} must enable one slice at least, got {enable_lora!r}")


def check_slices(enable_lora: EnableLora, out_features: int) -> None:
    """`check_enabled`, and the slices divide the out features.  Raises TypeError or ValueError."""
    check_enabled(enable_lora)
    if out_features % len(enable_lora):
        given = f"enable_lora={list(enable_lora)} has {len(enable_lora)} slices"
        raise ValueError(f"{given}, expected a number that divides out_features={out_features}")


def to_blocks(B: Tensor, enable_lora: EnableLora) -> Tensor:
    """B (n · s, r) as the block matrix (out, n · r), differentiable."""
    blocks = B.chunk(sum(enable_lora))
    rows = iter(torch.block_diag(*blocks).chunk(len(blocks)))
    zero = B.new_zeros(()).expand(blocks[0].shape[0], len(blocks) * B.shape[1])
    return torch.cat([next(rows) if enabled else zero for enabled in enable_lora])


def from_blocks(matrix: Tensor, enable_lora: EnableLora, r: int) -> Tensor:
    """B (n · s, r) out of the block matrix (out, n · r).  Raises ValueError where that is not zero outside of the blocks."""
    enabled = [j for j, on in enumerate(enable_lora) if on]
    if matrix.dim() != 2 or matrix.shape[1] != len(enabled) * r or matrix.shape[0] % len(enable_lora):
        expected = f"(out, {len(enabled) * r})"
        raise ValueError(f"has shape {tuple(matrix.shape)}, expected {expected} for enable_lora={list(enable_lora)}")
    parts = matrix.unflatten(1, (len(enabled), r)).unflatten(0, (len(enable_lora), -1))
    B = torch.cat([parts[j, :, i] for i, j in enumerate(enabled)])
    if B.count_nonzero() != matrix.count_nonzero():
        raise ValueError(f"has values outside of the blocks of enable_lora={list(enable_lora)}, which cannot hold them")
    return B
