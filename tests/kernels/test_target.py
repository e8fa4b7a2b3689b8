"""target.py: what each compute capability has."""

import pytest
import torch

from fastlora.kernels.target import INTERPRETER, Target, target_of


@pytest.mark.parametrize(
    ("capability", "descriptors", "wgmma", "tensor_memory"),
    [
        (80, False, False, False),
        (89, False, False, False),
        (90, True, True, False),
        (100, True, True, True),
        (103, True, True, True),
        (120, True, False, False),
    ],
)
def test_predicates(capability, descriptors, wgmma, tensor_memory):
    target = Target(capability, 100, 99 * 1024)
    assert (target.has_descriptors, target.has_wgmma, target.has_tensor_memory) == (descriptors, wgmma, tensor_memory)


def test_a_cpu_stands_for_the_interpreted_gpu():
    assert target_of(torch.device("cpu")) is INTERPRETER
