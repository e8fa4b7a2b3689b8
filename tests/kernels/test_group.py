"""group.py: the passes that projections share, on GPUs that split them, and on one that takes dA one by one."""

import pytest
import torch
from planned import AMPERE, MANY

from fastlora import dropout_mask, oracle
from fastlora.dropout import keep_scale
from fastlora.kernels import group
from fastlora.kernels.target import INTERPRETER

WORDS, P, C = (2, 0, 7), 0.25, keep_scale(0.25)


@pytest.mark.parametrize("target", [INTERPRETER, MANY, AMPERE], ids=["one", "split", "ampere"])
@pytest.mark.parametrize(("M", "K", "r"), [(37, 72, 4), (70, 136, 16), (3, 9, 70), (0, 8, 2)])
@pytest.mark.parametrize("add", [False, True])
def test_against_float64(M, K, r, target, add):
    x, A, seed = torch.randn(M, K), torch.randn(3 * r, K), torch.tensor([11])
    Ws, Bs, dys = ([torch.randn(*sizes) for sizes in shapes] for shapes in ([(8, K)] * 3, [(8, r)] * 3, [(M, 8)] * 3))
    ys, dx = [torch.empty(M, 8) for _ in Ws], torch.randn(M, K) if add else torch.full((M, K), torch.nan)
    scalings, facts = (1.0, 2.0, -0.5), {"target": target}
    before = dx.double() if add else torch.zeros(M, K).double()
    S = group.forward_shared(x, Ws, A, Bs, [None] * 3, seed, WORDS, scalings, P, ys, choice="fused", **facts)
    dA, dBs = group.backward_shared(x, dys, A, Bs, [*S], seed, WORDS, scalings, P, dx, add, **facts)
    expected_dx, floor = before, 2 * oracle.FLOOR[torch.float32, torch.float32]
    for i, word in enumerate(WORDS):
        own = slice(i * r, i * r + r)
        dropped = torch.where(dropout_mask(11, M, K, P, projection=word), x.double() * C, 0.0)
        of_S, dS = dropped @ A[own].double().t(), scalings[i] * dys[i].double() @ Bs[i].double()
        term = torch.where(dropout_mask(11, M, K, P, projection=word), C * dS @ A[own].double(), 0.0)
        expected_dx = expected_dx + term
        results = {"S": (S[i], of_S), "dA": (dA[own], dS.t() @ dropped)}
        results["y"] = ys[i], x.double() @ Ws[i].double().t() + scalings[i] * of_S @ Bs[i].double().t()
        results["dB"] = dBs[i], scalings[i] * dys[i].double().t() @ of_S
        for name, (result, ref) in results.items():
            assert oracle.relative_error(result, ref) <= floor, name
    assert oracle.relative_error(dx, expected_dx) <= floor
