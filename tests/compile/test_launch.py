"""launch.py: what reaches libcuda is what Triton itself would send, byte for byte, and when Triton's own path is taken."""

import copy
import ctypes
import gc
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastlora.kernels import launch, steps
from fastlora.kernels.launch import Result
from fastlora.kernels.sums import plan_sum, sum_partials_kernel
from tools.cases import TARGETS
from tools.stub_driver import Unavailable, stub_gpu

PLANS = (steps.plan_forward, steps.plan_backward, steps.plan_y)
M, K, N = 1024, 512, 768
PARAM = re.compile(r"\.param (?:\.align \d+ )?\.[a-z](\d+) [^\n]*?_param_\d+(?:\[(\d+)\])?")


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    )


Sent = list[tuple[Any, ...]]
LOADED: dict[int, CompiledKernel] = {}  # by the handle of libcuda; Triton keeps its kernels, too


@pytest.fixture(params=[90])
def sent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    """What libcuda is sent: the kernel, how it is launched, and the bytes of each parameter, of which PTX has the size."""
    launches: Sent = []
    load = CompiledKernel._init_handles

    def remember(kernel: CompiledKernel) -> None:
        load(kernel)
        LOADED[kernel.function] = kernel

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p))
    def record(function: int, config: Any, params: Any) -> int:
        kernel, how = LOADED[function], config.contents
        sizes = [int(bits) // 8 * int(count or 1) for bits, count in PARAM.findall(kernel.asm["ptx"])]
        values = tuple(ctypes.string_at(params[index], size) for index, size in enumerate(sizes))
        options = tuple(how.grid), tuple(how.block), how.shared, how.stream, how.attribute_count
        launches.append((kernel.metadata.name, *options, values))
        return 0

    monkeypatch.setattr(CompiledKernel, "_init_handles", remember)
    for plan in PLANS:
        plan.cache_clear()
    try:
        with stub_gpu(request.param) as stub:
            stub.stub_on_launch(record)
            yield launches
            stub.stub_on_launch(None)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for plan in PLANS:
        plan.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton launched by its own path."""
    names: list[str] = []
    describe = CompiledKernel.launch_metadata

    def note(kernel: CompiledKernel, *args: Any) -> Any:
        names.append(kernel.metadata.name)
        return describe(kernel, *args)

    monkeypatch.setattr(CompiledKernel, "launch_metadata", note)
    return names


def step(form: str, rank: int, adapter: torch.dtype, capability: int, scaling: float, *, with_x: bool = True) -> None:
    """Forward and backward."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, dy, weight, bias, S = new(M, K), new(M, N), new(N, K), new(N), new(M, rank, dtype=torch.float32)
    A, B, seed = new(rank, K, dtype=adapter), new(N, rank, dtype=adapter), new(1, dtype=torch.int64)
    options: dict[str, Any] = {"choice": form, "target": TARGETS[capability]}
    steps.forward(x, weight, A, B, bias, seed, scaling, scaling / 16, **options)
    given = (x, weight, A, B, S) if with_x else (None, weight, A, B, None)
    steps.backward(dy, *given, seed, scaling, scaling / 16, adapter, **options)


@pytest.mark.parametrize(
    ("sent", "form", "rank", "adapter", "with_x", "kernels"),
    [
        (90, "fused", 16, torch.bfloat16, True, "shrink sum_partials gemm grad_b grad_a"),
        (90, "addmm", 16, torch.float32, True, "shrink gemm grad_b grad_a"),
        (90, "fused", 16, torch.bfloat16, False, "shrink gemm pack_bits"),
        (90, "addmm", 128, torch.bfloat16, True, "shrink gemm grad_a"),
        (80, "fused", 16, torch.bfloat16, True, "shrink sum_partials gemm grad_b grad_a"),
    ],
    indirect=["sent"],
    ids=["descriptors", "addmm and float32 adapters", "a mask without x", "a pass for dS and one for dB", "pointers"],
)
def test_libcuda_gets_what_triton_would_send(
    sent: Sent,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    rank: int,
    adapter: torch.dtype,
    with_x: bool,
    kernels: str,
) -> None:
    """Each launch is repeated with Triton's own path: the same tensors, hence the same addresses."""
    run, capability = launch.launch, torch.cuda.current_device()
    held: list[Any] = []  # no address comes twice

    def twice(plan: launch.Plan, *args: Any) -> None:
        if 0 not in plan.grid:
            held.append(args)
            run(plan, *args)
            with monkeypatch.context() as patch:
                patch.setattr(knobs.runtime, "launch_enter_hook", lambda facts: None)
                run(plan, *args)

    monkeypatch.setattr(launch, "launch", twice)
    step(form, rank, adapter, capability, 2.0, with_x=with_x)
    first, names = sent[::2], [name for name, *_ in sent[::2]]
    assert set(names) >= {f"{name}_kernel" for name in kernels.split()}
    asked.clear()
    sent.clear()
    step(form, rank, adapter, capability, 3.0, with_x=with_x)
    assert asked == names  # Triton launched the repetitions alone
    for (name, *direct), (_, *triton_sent) in zip(sent[::2], sent[1::2], strict=True):
        assert direct == triton_sent, name
    assert all(call[-1] != before[-1] for call, before in zip(sent[::2], first, strict=True))  # nothing of a call is kept


def test_the_second_step_does_not_ask_triton(sent: Sent, asked: list[str]) -> None:
    def forward(K: int, seed: Tensor | None) -> None:
        x, weight, A, B = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (16, K), (N, 16)))
        steps.forward(x, weight, A, B, None, seed, 2.0, 0.25, choice="fused", target=TARGETS[90])

    seeds = torch.zeros(3, dtype=torch.int64)
    forward(K, seeds[:1])
    count, first = len(sent), len(asked)
    forward(K, seeds[1:2])  # at 8 bytes, which no kernel is compiled for in particular
    assert (len(sent), len(asked)) == (2 * count, first)
    for other in ((K - 8, seeds[:1]), (K, None)):
        before = len(asked)
        forward(*other)
        assert len(asked) > before


@pytest.fixture
def summing(sent: Sent) -> Any:
    """A launch of the smallest kernel."""
    sum_partials_kernel.device_caches.clear()  # its launcher is made anew
    plan, partials, out = plan_sum(Result((1024,), torch.float32, 2)), torch.zeros(2, 1024), torch.zeros(1024)
    return lambda: launch.launch(plan, partials, out, None, None, *plan.sizes)


class Other(nvidia.CudaLauncher):
    """What a tool that wraps Triton's launcher would make active."""


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (knobs.runtime, "launch_enter_hook", lambda facts: None),
        (knobs.runtime, "launch_exit_hook", lambda facts: None),
        (knobs.runtime.launch_enter_hook, "calls", [lambda facts: None]),
        (knobs.runtime.launch_exit_hook, "calls", [lambda facts: None]),
    ],
)
def test_hooks_get_tritons_own_path(
    sent: Sent, asked: list[str], summing: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    summing()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        summing()
    assert len(asked) == 2
    summing()
    assert len(asked) == 2
    assert len(sent) == 3


@pytest.mark.parametrize("what", ["version", "launcher", "order"])
def test_an_unknown_launcher_gets_tritons_own_path(
    sent: Sent, asked: list[str], summing: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "version":
        monkeypatch.setattr(triton, "__version__", "4.0.0")
    elif what == "launcher":
        monkeypatch.setattr(driver.active, "launcher_cls", Other)
    else:
        call = nvidia.CudaLauncher.__call__
        monkeypatch.setattr(nvidia.CudaLauncher, "__call__", lambda self, x, y, *rest: call(self, y, x, *rest))
    summing()
    summing()
    assert len(asked) == len(sent) == 2
    assert sent[0] == sent[1]


@pytest.mark.parametrize(
    "need", [{"global_scratch_size": 64}, {"profile_scratch_size": 64}, {"instrumentation_mode": "consan"}]
)
def test_scratch_memory_and_instrumentation_are_left_to_triton(
    sent: Sent, need: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sum(Result((512,), torch.float32, 2))
    args = torch.zeros(2, 512), torch.zeros(512), None, None, *plan.sizes
    kernel = plan.kernel[plan.grid](*args, enable_fp_fusion=True, **plan.options)
    assert launch._direct(plan, kernel, 90, ()) is not None
    needy = copy.copy(kernel)
    needy.metadata = kernel.metadata._replace(**need)
    assert launch._direct(plan, needy, 90, ()) is None
    needy.module = None  # it is `kernel`'s, to unload


def test_a_plan_keeps_its_kernel(sent: Sent, asked: list[str], summing: Any) -> None:
    """Triton unloads a kernel that nobody holds, from 3.8 on."""
    summing()
    kernel = weakref.ref(LOADED.popitem()[1])
    sum_partials_kernel.device_caches.clear()
    gc.collect()
    assert kernel() is not None


def test_descriptors_are_kept_for_each_address(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = nvidia.make_tensordesc_arg

    def note(descriptor: Any, *rest: Any) -> Any:
        made.append(descriptor.base.data_ptr())
        return make(descriptor, *rest)

    def forward(x: Tensor) -> None:
        steps.forward(x, weight, A, B, None, None, 2.0, 0.0, out, choice="fused", target=TARGETS[90])

    shapes = (M, K), (M, K), (N, K), (16, K), (N, 16), (M, N)
    x, other, weight, A, B, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    forward(x)
    monkeypatch.setattr(nvidia, "make_tensordesc_arg", note)
    forward(x)
    assert made == [matrix.data_ptr() for matrix in (x, weight, out)]
    forward(other)
    forward(x)
    assert made[3:] == [other.data_ptr()]
    monkeypatch.setattr(launch, "DESCRIPTORS", 2)
    third = torch.zeros_like(x)
    forward(third)
    forward(x)
    assert made[4:] == [third.data_ptr(), x.data_ptr()]  # the full table was emptied
