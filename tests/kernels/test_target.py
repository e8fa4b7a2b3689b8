"""target.py: what each compute capability has."""

from types import SimpleNamespace

import pytest
import torch

from fastlora.kernels import target
from fastlora.kernels.target import INTERPRETER, NOT_NVIDIA, Target, target_of


@pytest.mark.parametrize(
    ("capability", "descriptors", "wgmma", "tensor_memory"),
    [
        (NOT_NVIDIA, False, False, False),
        (80, False, False, False),
        (89, False, False, False),
        (90, True, True, False),
        (100, True, True, True),
        (103, True, True, True),
        (120, True, False, False),
    ],
)
def test_predicates(capability, descriptors, wgmma, tensor_memory):
    gpu = Target(capability, 100, 99 * 1024)
    assert (gpu.has_descriptors, gpu.has_wgmma, gpu.has_tensor_memory) == (descriptors, wgmma, tensor_memory)
    assert gpu.runs_ptx == (capability != NOT_NVIDIA)


@pytest.mark.parametrize("capability", [80, 90, 100, 103, 120])
@pytest.mark.parametrize(
    ("span", "on_blackwell"), [(2**17 - 1, False), (2**17, True), (2**31 - 1, True), (2**31, False), (2**33, False)]
)
def test_descriptors_on_blackwell_span_128_kib_to_2_gib(capability, span, on_blackwell):
    assert Target(capability, 100, 99 * 1024).can_describe(span) == (capability == 90 or (capability >= 100 and on_blackwell))


@pytest.mark.parametrize(("hip", "capability"), [(None, 94), ("7.0", NOT_NVIDIA)])
def test_an_amd_gpu_has_no_capability(monkeypatch, hip, capability):
    """ROCm's torch gives a gfx942 the capability 9.4, and calls it a CUDA device."""
    properties = SimpleNamespace(major=9, minor=4, multi_processor_count=304, name="MI300X", warp_size=64)
    limits = SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 65536}))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(target, "driver", SimpleNamespace(active=limits))
    target._gpu_target.cache_clear()
    assert target_of(torch.device("cuda:0")) == Target(capability, 304, 65536, "MI300X", 64)
    target._gpu_target.cache_clear()


def test_a_cpu_stands_for_the_interpreted_gpu():
    assert target_of(torch.device("cpu")) is INTERPRETER
