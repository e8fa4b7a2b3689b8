"""What the kernels need to know of a GPU: its capability and limits, as named predicates.  Its name decides nothing."""

import functools
from dataclasses import dataclass

import torch
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True)
class Target:
    """capability: 10 · major + minor.  sms: multiprocessors.  shared_memory: bytes that one program may use.

    name: from the driver.  Measured choices are stored under it and nothing else reads it; "" stores none.
    """

    capability: int
    sms: int
    shared_memory: int
    name: str = ""

    @property
    def has_descriptors(self) -> bool:
        """Tensor descriptors run on hardware (TMA).  Below 9.0 Triton emulates them."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        """Four warps share one matrix instruction (wgmma, tcgen05).  A 128 x 256 tile stays in registers only with it."""
        return 90 <= self.capability < 120

    @property
    def has_register_operands(self) -> bool:
        """wgmma reads its first operand from registers, or the second from shared memory, while the warps go on (9.x)."""
        return self.has_wgmma and not self.has_tensor_memory

    @property
    def has_tensor_memory(self) -> bool:
        """Accumulators live in tensor memory (10.x).  They pass through registers whenever they are scaled or masked."""
        return 100 <= self.capability < 120


INTERPRETER = Target(capability=90, sms=4, shared_memory=232448)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # what Triton checks a launch against
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count, limit, properties.name)


def target_of(device: torch.device) -> Target:
    """The target behind `device`.  A CPU, where only the interpreter runs kernels, counts as a small Hopper GPU."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    assert knobs.runtime.interpret, "lora_linear sends kernels to a CPU only when they are interpreted"
    return INTERPRETER
