"""The network of the state machines, and the judgement of what it computes: eager error twice, or the oracle's floor."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastlora import oracle

#: Every judged tensor has so many elements, or more: the error of a few 16-bit ones depends on luck.
SIZE = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Network(nn.Module):
    """Two layers for adapters, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def run(model: nn.Module, seed: int, *, grads: bool) -> dict[str, Tensor]:
    """y of random inputs, and on request the gradient of every trainable parameter.  `seed` is that of the masks too."""
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora_" not in name)
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn((2 * SIZE, SIZE), generator=generator).half().bfloat16().to(dtype) for _ in range(2))  # exact in all
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grads):
        y = model(x)
    if not grads:
        return {"y": y}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, list(trained.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}


def assert_accurate(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Each tensor is at most twice as far from the truth as eager's, or within the floor of its dtype."""
    assert ours.keys() == eager.keys() == truth.keys()
    for name, ref in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        base = ours["y"].dtype
        if base.itemsize == 2 and ref.numel() < SIZE * SIZE:
            continue
        error, own = (oracle.relative_error(some[name], ref) for some in (ours, eager))
        assert error <= max(oracle.EAGER_FACTOR * own, oracle.FLOOR[base, ours[name].dtype]), (name, error, own)


def assert_equal(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names in the same order, the same dtypes, the same bits."""
    assert list(ours) == list(expected)
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
