"""What the kernels need to know of a GPU: its capability and limits, as named predicates; its name decides nothing."""

import functools
from dataclasses import dataclass

import torch
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True)
class Target:
    """capability: 10 · major + minor.  sms: multiprocessors.  shared_memory: bytes one program may use.

    name: as the driver gives it, under which measured choices are kept; "" where there are none.  Nothing else may ask for it.
    """

    capability: int
    sms: int
    shared_memory: int
    name: str = ""

    @property
    def has_descriptors(self) -> bool:
        """Tensor descriptors are hardware (TMA); below 9.0 they would be emulated."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        """One matrix instruction serves four warps (wgmma, tcgen05), which a 128 x 256 tile needs to stay in registers."""
        return 90 <= self.capability < 120

    @property
    def has_tensor_memory(self) -> bool:
        """Accumulators live in a memory of their own (10.x) and pass through registers whenever they are scaled or masked."""
        return 100 <= self.capability < 120


INTERPRETER = Target(capability=90, sms=4, shared_memory=232448)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # what Triton checks a launch against
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count, limit, properties.name)


def target_of(device: torch.device) -> Target:
    """The target behind `device`; a CPU, which only the interpreter can serve, is taken for a small Hopper GPU."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    assert knobs.runtime.interpret, "the public boundary lets only interpreted kernels through to a CPU"
    return INTERPRETER
