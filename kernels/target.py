"""What the kernels need to know of a GPU: its capability and limits, as named predicates.  Its name decides nothing."""

import functools
from dataclasses import dataclass

import torch
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True)
class Target:
    """capability: an NVIDIA GPU's 10 · major + minor, NOT_NVIDIA for an AMD GPU.  sms: multiprocessors, or compute units.

    shared_memory: bytes that one program may use.  warp_size: threads of a warp.
    name: from the driver.  Measured choices are stored under it and nothing else reads it; "" stores none.
    """

    capability: int
    sms: int
    shared_memory: int
    name: str = ""
    warp_size: int = 32

    @property
    def runs_ptx(self) -> bool:
        """Kernels may hold inline PTX."""
        return self.capability != NOT_NVIDIA

    @property
    def has_descriptors(self) -> bool:
        """Tensor descriptors run on hardware (TMA).  Below 9.0 Triton emulates them."""
        return self.capability >= 90

    def can_describe(self, span: int) -> bool:
        """Whether a descriptor can address an operand of `span` bytes from its first element to its last.

        Drivers up to CUDA 13.1 encode one of less than 128 KiB wrongly for Blackwell, which ends in illegal accesses (known
        issue of driver 595.71).  Triton corrects it from 3.7 on, but counts the span in 32 bits: from 2 GiB on it is wrong.
        """
        blackwell = self.capability >= 100
        return self.has_descriptors and (not blackwell or 128 * 1024 <= span < 2**31)

    @property
    def has_wgmma(self) -> bool:
        """Four warps share one matrix instruction (wgmma, tcgen05).  A 128 x 256 tile stays in registers only with it."""
        return 90 <= self.capability < 120

    @property
    def has_register_operands(self) -> bool:
        """wgmma reads its first operand from registers, or the second from shared memory, while the warps go on (9.x)."""
        return self.has_wgmma and not self.has_tensor_memory

    @property
    def register_limit(self) -> dict[str, int]:
        """The option of a launch that lets a thread have all 255 registers.

        On Blackwell ptxas otherwise stops at 128 or 168 and spills 8 bytes (Triton 3.7.1 on 12.0, 3.8 and 3.9 on 10.0).
        """
        return {"maxnreg": 255} if self.capability >= 100 else {}

    @property
    def has_tensor_memory(self) -> bool:
        """Accumulators live in tensor memory (10.x).  They pass through registers whenever they are scaled or masked."""
        return 100 <= self.capability < 120


NOT_NVIDIA = 0  # a capability that has nothing of what the predicates ask for
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor that has tensor memory; a column holds 32 bits of each of 128 rows
INTERPRETER = Target(capability=90, sms=4, shared_memory=232448)


@functools.cache
def _gpu_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # what Triton checks a launch against
    capability = NOT_NVIDIA if torch.version.hip else 10 * properties.major + properties.minor
    return Target(capability, properties.multi_processor_count, limit, properties.name, properties.warp_size)


def target_of(device: torch.device) -> Target:
    """The target behind `device`.  A CPU, where only the interpreter runs kernels, counts as a small Hopper GPU."""
    if device.type == "cuda":
        return _gpu_target(torch.cuda.current_device() if device.index is None else device.index)
    assert knobs.runtime.interpret, "lora_linear sends kernels to a CPU only when they are interpreted"
    return INTERPRETER
