"""Random projections of one x, and the oracle's verdict on what a function makes of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora import Projection, dropout_mask, lora_linears, oracle, reference
from fastlora.oracle import Case

M, K, SEED = 37, 40, 5


class Group:
    """Random operands of projections: (out, rank, rate, bias) of each."""

    def __init__(
        self,
        *members: tuple[int, int, float, bool],
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        shape: tuple[int, int] = (M, K),
        device: str = "cpu",
    ) -> None:
        self.shape = shape
        self.cases = [
            Case((*shape, out), r, dtype, adapter_dtype, bias=bias, dropout_p=p, scaling=1.5 - i, seed=i)
            for i, (out, r, p, bias) in enumerate(members)
        ]
        drawn = [oracle.draw(case, device=device) for case in self.cases]
        self.x, self.dys = drawn[0].x, [one.dy for one in drawn]
        self.weights = [one.weights for one in drawn]

    def projections(self, weights: list[Any]) -> list[Projection]:
        return [Projection(*own, case.scaling, case.dropout_p) for own, case in zip(weights, self.cases, strict=True)]

    def results(self, function: Callable[[Tensor, list[Any]], Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
        """y and every gradient by name, of function(x, the weights of each projection)."""

        def leaf(tensor: Tensor | None, trained: bool = True) -> Tensor | None:
            return None if tensor is None else tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(trained)

        x = leaf(self.x)
        weights = [[leaf(W, False), leaf(A), leaf(B), leaf(bias)] for W, A, B, bias in self.weights]
        ys = function(x, weights)
        torch.autograd.backward(ys, [dy.to(dtype or dy.dtype) for dy in self.dys])
        found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
        for i, own in enumerate(weights):
            for name, tensor in zip(("dA", "dB", "dbias"), own[1:], strict=True):
                if tensor is not None:
                    found[f"{name}{i}"] = tensor.grad
        return found

    def eager(self, x: Tensor, weights: list[Any], word: Callable[[int], int] = int) -> list[Tensor]:
        masks = [
            dropout_mask(SEED, *self.shape, case.dropout_p, projection=word(i), device=x.device)
            for i, case in enumerate(self.cases)
        ]
        return [
            reference.lora_linear(x, *own, scaling=case.scaling, dropout_p=case.dropout_p, keep_mask=mask)
            for own, case, mask in zip(weights, self.cases, masks, strict=True)
        ]

    def assert_parity(self, function: Callable[[Tensor, list[Any]], Any], word: Callable[[int], int] = int) -> None:
        def expected(x: Tensor, weights: list[Any]) -> list[Tensor]:
            return self.eager(x, weights, word)

        result, eager, ref = self.results(function), self.results(expected), self.results(expected, torch.float64)
        assert result.keys() == ref.keys()
        rows = [
            oracle.judge(self.cases[int(name[-1]) if name[-1].isdigit() else 0], name.rstrip("0123456789"), *triple)
            for name, *triple in ((name, result[name], eager[name], ref[name]) for name in ref)
        ]
        assert all(row.passed for row in rows), oracle.table(rows)


def fused(group: Group, backend: str | None, **options: Any) -> Callable[[Tensor, list[Any]], Any]:
    return lambda x, weights: lora_linears(x, group.projections(weights), seed=SEED, backend=backend, **options)
