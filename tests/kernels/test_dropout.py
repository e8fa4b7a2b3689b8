"""dropout.py: every kernel takes the mask of fastlora/dropout.py, bit for bit and at every tile size."""

import numpy as np
import pytest
import torch
from planned import run_grad_a, run_pack_bits, run_shrink

from fastlora import dropout_mask
from fastlora.dropout import keep_scale

RATES = (0.001, 0.05, 0.1, 0.5, 0.97, 0.999, 1.0)


def unpack(bits: torch.Tensor, cols: int) -> torch.Tensor:
    """uint8 (M, ⌈cols / 8⌉) -> bool (M, cols)."""
    unpacked = np.unpackbits(bits.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(unpacked[:, :cols].astype(bool))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (37, 131), (64, 256), (70, 8)])
def test_packed_bits_are_the_mask(p, rows, cols):
    seed = torch.tensor([-(2**63) + 12345])
    expected = dropout_mask(seed, rows, cols, p)
    assert torch.equal(unpack(run_pack_bits(seed, rows, cols, p), cols), expected)
    x, U = torch.randn(rows, cols), torch.randn(rows, 3)
    _, bits = run_grad_a(x, U, torch.float32, pack=True, seed=seed, dropout_p=p)
    assert torch.equal(unpack(bits, cols), expected)


@pytest.mark.parametrize(("block_m", "block_k"), [(1, 8), (8, 16), (16, 64), (128, 32)])
def test_tile_shape_does_not_matter(block_m, block_k):
    seed, rows, cols, p = torch.tensor([99]), 18, 77, 0.3
    bits = run_pack_bits(seed, rows, cols, p, block_m=block_m, block_k=block_k)
    assert torch.equal(unpack(bits, cols), dropout_mask(seed, rows, cols, p))


@pytest.mark.parametrize("p", RATES)
def test_shrink_drops_the_elements_of_the_mask(p):
    """With A = 1 each row of S counts what is kept of a one-hot row of x, so every element is checked on its own."""
    cols, seed = 40, torch.tensor([7])
    x = torch.eye(cols).repeat(3, 1)
    S = run_shrink(x, torch.ones(1, cols), seed=seed, dropout_p=p)
    kept = dropout_mask(seed, 3 * cols, cols, p)[torch.arange(3 * cols), torch.arange(3 * cols) % cols]
    assert torch.equal(S.squeeze(1), kept * torch.tensor(keep_scale(p), dtype=torch.float32))
