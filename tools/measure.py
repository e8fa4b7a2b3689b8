"""Measure one case: compile its step without and with dropout, read the machine code, and report faults."""

from dataclasses import dataclass
from math import prod
from typing import Any

from fastlora.kernels.target import TENSOR_MEMORY_COLUMNS
from tools.aot import Compiled, offline
from tools.cases import DROPOUT, CompileCase
from tools.sass import Sass, read_kernel
from tools.wgmma import in_ptx

# kernels that a step launches, in order -> what they compute.  Sums of partial results are measured as a step of their own.
PRODUCTS = {
    ("shrink", "gemm"): ("S", "y"),
    ("grad_b", "grad_a", "gemm"): ("dS dB", "dA", "dx"),
    ("shrink", "grad_a", "grad_a", "gemm"): ("dS", "dB", "dA", "dx"),
    ("shrink", "grad_a"): ("S", "dA dx"),
    ("shrink",): ("S",),
    ("pack_bits",): ("bits",),
    ("sum_partials",): ("sum",),
    ("gated",): ("h S",),
    ("gated_backward",): ("de dg dA",),
    ("grad_b", "grad_a"): ("dS dB", "dA dx"),
    ("shrink", "grad_a", "grad_a"): ("dS", "dB", "dA dx"),
    (): (),
}
# The tile that a program masks at a time.
MASKED_TILE = {
    "S": ("BLOCK_M", "BLOCK_K"),
    "dA": ("BLOCK_M", "BLOCK_K"),
    "dA dx": ("BLOCK_M", "BLOCK_K"),
    "h S": ("BLOCK_M", "BLOCK_K"),
    "de dg dA": ("BLOCK_M", "BLOCK_K"),
    "dx": ("BLOCK_M", "BLOCK_N"),
}


@dataclass(frozen=True)
class KernelFacts:
    """What is known of one compiled kernel of a case.

    Attributes:
        product: what it computes, a value of PRODUCTS.
        config: tile sizes, num_warps and num_stages.
        shared: bytes of shared memory per program.
        tensor_memory: columns (capability 100).
        dots: whether it multiplies matrices.
        rewritten_in_ptx: registers of a wgmma in flight that the PTX rewrites, see `tools.wgmma`.
        conversions: `ttg.convert_layout` operations.  Each goes through shared memory or shuffles.
        per_element: issue slots of the loop over x per element of x, `Sass.issue_slots` · threads of a program / elements of a
            tile.  None for a kernel that does not stream x.
        per_masked_element: instructions that dropout adds per masked element: those of the loop over x, and those of the
            whole kernel in the GEMM, which masks once.  None without dropout, and where dropout changes the tile.
    """

    case: CompileCase
    dropout: bool
    product: str
    kernel: str
    config: dict[str, Any]
    sass: Sass
    shared: int
    tensor_memory: int
    dots: bool
    rewritten_in_ptx: tuple[str, ...]
    conversions: int
    per_element: float | None
    per_masked_element: float | None

    @property
    def key(self) -> str:
        return f"{self.case} {self.product}{' dropout' if self.dropout else ''}"


def measure(case: CompileCase) -> list[KernelFacts]:
    """The kernels of a case without dropout, then those that dropout changes.  On a cold cache a kernel takes seconds."""
    plain, masked = _compile(case, 0.0), _compile(case, DROPOUT)
    rows = {product: _row(case, False, product, launch) for product, launch in plain.items()}
    same = [product for product in plain if masked[product].compiled.hash == plain[product].compiled.hash]
    differing = [_row(case, True, product, masked[product], rows.get(product)) for product in masked if product not in same]
    return [*rows.values(), *differing]


def _compile(case: CompileCase, dropout_p: float) -> dict[str, Compiled]:
    with offline(case.capability) as launches:
        case.run(dropout_p)
    if case.step != "sum":
        launches = [launch for launch in launches if launch.kernel != "sum_partials_kernel"]
    kernels = tuple(launch.kernel.removesuffix("_kernel") for launch in launches)
    return dict(zip(PRODUCTS[kernels], launches, strict=True))


def _row(case: CompileCase, dropout: bool, product: str, launch: Compiled, plain: KernelFacts | None = None) -> KernelFacts:
    assembly, metadata = launch.compiled.asm, launch.compiled.metadata
    config = {name: value for name, value in launch.constexprs.items() if name.startswith("BLOCK")}
    config |= {name: launch.options[name] for name in ("num_warps", "num_stages")}
    sass = read_kernel(assembly)
    per_element = per_masked_element = None
    if product in MASKED_TILE and sass.loop:
        tile = prod(config[name] for name in MASKED_TILE[product])
        threads_per_element = case.target.warp_size * config["num_warps"] / tile
        per_element = None if product == "dx" else sass.issue_slots * threads_per_element
        if dropout and plain is not None and plain.config == config:
            per_masked_element = (_of_mask(product, sass) - _of_mask(product, plain.sass)) * threads_per_element
    return KernelFacts(
        case=case,
        dropout=dropout,
        product=product,
        kernel=launch.kernel.removesuffix("_kernel"),
        config=config,
        sass=sass,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        dots="tt.dot" in assembly["ttir"],
        rewritten_in_ptx=in_ptx(assembly["ptx"]) if "ptx" in assembly else (),
        conversions=assembly["ttgir"].count("ttg.convert_layout"),
        per_element=per_element,
        per_masked_element=per_masked_element,
    )


def _of_mask(product: str, sass: Sass) -> int:
    """The instructions that the mask is a part of."""
    return sass.instructions if product == "dx" else sum(sass.loop.values())


def faults(row: KernelFacts) -> list[str]:
    """Faults that no budget allows.  Empty when there is none."""
    found = []
    sass, target = row.sass, row.case.target
    if sass.stack or sass.local:
        found.append(f"spills: {sass.stack} bytes of stack per thread, {sass.local} loads and stores of local memory")
    if sass.atomics:
        found.append(f"{sass.atomics} atomics: results may differ between runs")
    if row.shared > target.shared_memory:
        found.append(f"shared memory: {row.shared} bytes, the device has {target.shared_memory}")
    if row.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory: {row.tensor_memory} columns, the device has {TENSOR_MEMORY_COLUMNS}")
    for level, rewritten in {"PTX": row.rewritten_in_ptx, "machine code": sass.rewritten}.items():
        if rewritten:
            found.append(f"registers of a wgmma in flight are rewritten: {len(rewritten)} in {level}, {rewritten[0]}")
    if row.dots and not row.case.dtype.endswith("ieee"):
        if not sass.tensor_core:
            found.append("no tensor-core instruction")
        elif row.kernel == "gemm" and row.case.capability == 90 and not sass.hgmma:
            found.append("no HGMMA")
    return found
