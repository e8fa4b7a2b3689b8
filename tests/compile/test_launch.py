"""The second launch of a plan hands Triton's launcher exactly the arguments of the first."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.compiler import CompiledKernel
from triton.compiler.compiler import LazyDict
from triton.runtime import driver

from fastlora.kernels import steps
from fastlora.kernels.dropout import mask_threshold
from fastlora.kernels.shrink import shrink_kernel
from fastlora.kernels.steps import plan_backward, plan_forward
from tools.aot import OfflineDriver
from tools.cases import TARGETS

PLANS = (plan_forward, plan_backward)
M, K, N, R = 1024, 512, 768, 16
Calls = list[tuple[Any, ...]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The calls of Triton's launchers.  Nothing runs; the kernels are compiled for capability 90."""
    calls: Calls = []

    def load(self: CompiledKernel) -> None:
        self.module, self.function = "loaded", self.metadata.name
        self._run = lambda *args: calls.append(args)

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 90)
    for plan in PLANS:
        plan.cache_clear()
    active = driver._active  # reading `driver.active` would look for a GPU
    driver.set_active(OfflineDriver(90))
    yield calls
    driver.set_active(active)
    for plan in PLANS:
        plan.cache_clear()


def comparable(argument: Any) -> Any:
    """What a launcher reads of an argument, less the address of its data."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, tuple(argument.shape), argument.stride(), argument.device
    if hasattr(argument, "block_shape"):
        return comparable(argument.base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
    if isinstance(argument, LazyDict):  # for the hooks of a profiler
        return argument.data
    return argument


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["fused", "addmm"])
def test_a_planned_launch_is_what_triton_would_launch(launched: Calls, form: str, adapter: torch.dtype) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def step(scaling: float, dropout_p: float) -> Calls:
        launched.clear()
        x, dy, weight, bias, S = meta(M, K), meta(M, N), meta(N, K), meta(N), meta(M, R, dtype=torch.float32)
        A, B, seed = meta(R, K, dtype=adapter), meta(N, R, dtype=adapter), meta(1, dtype=torch.int64)
        options: dict[str, Any] = {"choice": form, "target": TARGETS[90]}
        steps.forward(x, weight, A, B, bias, seed, scaling, dropout_p, **options)
        steps.backward(dy, x, weight, A, B, S, seed, scaling, dropout_p, adapter, **options)
        return [tuple(map(comparable, call)) for call in launched]

    first, again = step(2.0, 0.25), step(2.0, 0.25)
    assert len(first) >= 5
    assert again == first
    other = step(3.0, 0.5)  # run-time arguments are not kept
    assert [call[4] for call in other] == [call[4] for call in first]
    assert any(mask_threshold(0.5, "f16x2") in call for call in other)
    assert not any(mask_threshold(0.25, "f16x2") in call for call in other)


def test_the_second_step_does_not_ask_triton(launched: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(K: int, seed: torch.Tensor | None) -> None:
        x, weight, A, B = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((M, K), (N, K), (R, K), (N, R)))
        steps.forward(x, weight, A, B, None, seed, 2.0, 0.25, choice="fused", target=TARGETS[90])

    seeds = torch.empty(3, dtype=torch.int64, device="meta")
    forward(K, seeds[:1])
    monkeypatch.setattr(type(shrink_kernel), "run", lambda *args, **options: pytest.fail("looked up again"))
    count = len(launched)
    forward(K, seeds[1:2])  # at 8 bytes, which no kernel is compiled for in particular
    assert len(launched) == 2 * count
    for other in ((K - 8, seeds[:1]), (K, None)):
        with pytest.raises(pytest.fail.Exception, match="looked up again"):
            forward(*other)
