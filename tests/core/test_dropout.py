"""The mask: a pure function of (seed, row, column), as the docstring of fastlora/dropout.py specifies it."""

import math
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora import dropout_mask
from fastlora.dropout import draw_seed, keep_scale, key_schedule, philox, threshold


def philox_of(seed: int, counter: Sequence[int]) -> list[int]:
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return [int(word) for word in philox(key_schedule(torch.tensor([signed])), [torch.tensor(word) for word in counter])]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # philox4x32 with 7 rounds in kat_vectors of Random123 (D. E. Shaw Research)
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox_of(key[0] | key[1] << 32, counter) == words


def test_mask_known_answer():
    """Pins seed, counter and lane layout: seed 2**40 + 3 has key (3, 256); rows 0 and 1, columns 0 .. 17, p = 0.5."""
    mask = dropout_mask((1 << 40) + 3, 2, 18, 0.5)
    expected = torch.zeros(2, 18, dtype=torch.bool)
    for row in range(2):
        for col in range(18):
            words = philox_of((1 << 40) + 3, (col // 8, row, 0, 0))
            expected[row, col] = (words[col % 8 // 2] >> (16 * (col % 2)) & 0x7FFF) >= 16384
    assert torch.equal(mask, expected)
    assert "".join("01"[int(keep)] for keep in mask.flatten()) == "001110000011100000101010010110001100"


@settings(max_examples=40)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    rows=st.integers(0, 300),
    cols=st.integers(0, 200),
    p=st.floats(0, 1),
    projection=st.integers(0, 2**32 - 1),
    calls=st.integers(1, 10000),
)
def test_mask_is_the_specification(seed, rows, cols, p, projection, calls):
    """For every seed, projection, size and p, in whatever pieces it is made."""
    with mock.patch("fastlora.dropout._CPU_CALLS", calls):
        mask = dropout_mask(seed, rows, cols, p, projection=projection)
    row, column = torch.arange(rows).unsqueeze(1), torch.arange(cols) // 8
    words = philox(key_schedule(torch.tensor([seed])), (column, row, torch.tensor([projection]), torch.tensor([0])))
    lane = torch.arange(cols) % 8
    word = torch.stack([word.expand(rows, cols) for word in words]).gather(0, (lane // 2).expand(1, rows, cols))[0]
    assert torch.equal(mask, (word >> 16 * (lane % 2) & 0x7FFF) >= threshold(p))
    assert torch.equal(mask, dropout_mask(torch.tensor([seed]), rows, cols, p, projection=projection))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_keep_rate(p):
    rows, cols = 3200, 3200
    kept = dropout_mask(2024, rows, cols, p).double().mean().item()
    rate = 1 - threshold(p) / 32768
    sigma = math.sqrt(rate * (1 - rate) / (rows * cols))
    assert abs(kept - rate) <= 4 * sigma
    assert abs(rate - (1 - p)) <= 0.5 / 32768


def correlation_z(a: torch.Tensor, b: torch.Tensor) -> float:
    """√n · the correlation of two masks: standard normal when they are independent."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_correlation(p):
    """Neighbours along rows and columns at several distances, lanes of one word, and masks of consecutive seeds."""
    mask = dropout_mask(5, 1024, 1024, p)
    pairs = {f"column + {d}": (mask[:, d:], mask[:, :-d]) for d in (1, 2, 7, 8, 9, 64)}
    pairs |= {f"row + {d}": (mask[d:], mask[:-d]) for d in (1, 2, 16, 128)}
    pairs |= {f"seed + {d}": (mask, dropout_mask(5 + d, 1024, 1024, p)) for d in (1, 2, 1 << 32)}
    z = {name: correlation_z(*pair) for name, pair in pairs.items()}
    assert max(map(abs, z.values())) < 4, z


def test_projections_draw_their_own_masks():
    """Two linears called one after the other, as a layer's q and v are, drop different elements of the same x."""
    torch.manual_seed(0)
    first, second = (dropout_mask(draw_seed("cpu"), 512, 512, 0.5) for _ in range(2))
    assert abs(correlation_z(first, second)) < 4


def test_seed_obeys_manual_seed():
    torch.manual_seed(3)
    seeds = [draw_seed("cpu") for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(draw_seed("cpu"), seed) for seed in seeds)
    assert len({int(seed) for seed in seeds}) == 3
    assert all(seed.dtype == torch.int64 and seed.shape == (1,) for seed in seeds)


@pytest.mark.parametrize(("p", "t"), [(0.0, 0), (1e-6, 0), (0.1, 3277), (0.5, 16384), (1.0, 32768)])
def test_threshold_and_scale(p, t):
    assert threshold(p) == t
    assert keep_scale(p) == (32768 / (32768 - t) if t < 32768 else 0.0)
