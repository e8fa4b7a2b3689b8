"""What the machine reaches, measured in the same run, and the least time that a pass could take on it.

    floor = max(operations / rate of cuBLAS's GEMM, compulsory bytes / rate of a large copy)

Operations are those of the GEMMs and of the rank-r products.  Compulsory bytes count each input and output once, S included.
No implementation overlaps both perfectly, so 100 % is out of reach where they take about equally long.  A percentage can exceed
100 where the frozen linear's own GEMM is faster than the square one measured here.
"""

from typing import NamedTuple

import torch

from fastlora import oracle
from fastlora.benchmark.clock import measure

REPEATS = 10
#: device type -> (n of the n x n matrices multiplied, bytes copied)
SIZES = {"cpu": (1024, 64 << 20), "cuda": (8192, 1 << 30)}


class Ceilings(NamedTuple):
    """Measured rates: of a square GEMM in 10¹² operations a second, of a copy in 10⁹ bytes read or written a second."""

    gemm_tflops: float
    copy_gbps: float

    def floor(self, case: oracle.Case, pass_: str) -> float:
        """The least seconds that the pass can take on this machine; rank 0 is the frozen linear alone."""
        return max(operations(case, pass_) / (1e12 * self.gemm_tflops), compulsory_bytes(case, pass_) / (1e9 * self.copy_gbps))


def operations(case: oracle.Case, pass_: str) -> int:
    """Multiplications and additions of a pass."""
    (m, k, n), r = case.shape, case.rank
    forward = 2 * m * (k * n + r * (k + n))  # x Wᵀ; drop(x) Aᵀ, S Bᵀ
    backward = 2 * m * (k * n + 2 * r * (k + n))  # dy W; dy B, dyᵀ S, dSᵀ drop(x), dS A
    return {"forward": forward, "backward": backward}.get(pass_, forward + backward)


def compulsory_bytes(case: oracle.Case, pass_: str) -> int:
    """Bytes of a pass that must cross the memory bus, each tensor once."""
    (m, k, n), r, base = case.shape, case.rank, case.dtype.itemsize
    adapters, S = r * (k + n) * case.adapters.itemsize, 4 * m * r
    frozen = base * (m * k + n * k + m * n)  # x, W, y; dy, W, dx
    forward = frozen + adapters + S + (base * n if case.bias else 0)
    backward = frozen + 2 * adapters + S + (base * m * k if r else 0)  # A, B, dA, dB, S and x
    return {"forward": forward, "backward": backward}.get(pass_, forward + backward)


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """The highest rates of a square GEMM and of a copy larger than the cache, on random data."""
    size, nbytes = SIZES[device.type]
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps = {"gemm": lambda: left @ right, "copy": lambda: target.copy_(source)}
    best = {name: min(times) for name, times in measure(steps, device, REPEATS).items()}
    return Ceilings(2 * size**3 / best["gemm"] / 1e12, 2 * nbytes / best["copy"] / 1e9)
