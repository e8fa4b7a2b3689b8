"""Read a compiled kernel: registers, stack, and counts of machine instructions, in SASS or an AMD GPU's assembly.

The Triton wheel brings `cuobjdump`, which disassembles a cubin without a CUDA toolkit or a GPU.  Triton's `asm["sass"]` is not
used: it stops after 4096 instructions, at the last four-digit address.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton import knobs

from tools.wgmma import in_sass

# "/*0a30*/   @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;   /* 0x... */": address, predicate if any, opcode, operands.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
# The pipe that executes an opcode; the first match counts.  Integer logic and multiplication issue at half rate each: 64
# results a clock on a multiprocessor that issues 128 (CUDA C++ Programming Guide, arithmetic instructions, 8.0 to 9.0).
_PIPES = {
    "tensor": re.compile(r"HMMA|HGMMA|UTC\w*MMA"),
    "memory": re.compile(r"LD|ST|ATOM|RED|UTMA|UBLK|SYNCS|MEMBAR|FENCE|DEPBAR|CCTL|SHFL"),
    "imad": re.compile(r"IMAD|IMUL"),
    "alu": re.compile(
        r"LOP3|PLOP3|I?ADD3|IADD|VIADD|SHF|PRMT|I?SETP|ISETP|FSETP|SEL|FSEL|LEA|[IF]?MNMX|VIMNMX|IABS|SGXT|MOV|F2FP|POPC|FLO|VOTE"
    ),
    "other": re.compile(""),
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOCAL = re.compile(r"(?:LDL|STL)\b")
_TENSOR_CORE = re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA)\b")
_NARROW_LOAD = re.compile(r"(?:LDG|LDGSTS)\b(?!.*\.(?:64|128|256))")


@dataclass(frozen=True)
class Sass:
    """Counts over one kernel.  Instruction counts are static and leave out NOPs, which pad the code.

    Attributes:
        registers: 32-bit registers per thread.
        stack: bytes per thread.
        local: loads and stores of local memory (LDL, STL).
        tensor_core: matrix instructions of any generation (HMMA, HGMMA, UTC*MMA, MFMA).
        hgmma: those of Hopper (HGMMA).
        atomics: atomic updates of global memory.  Their order is not fixed.
        narrow_loads: loads of global memory of fewer than 8 bytes per thread.
        rewritten: registers of a wgmma in flight that are rewritten, see `tools.wgmma`.
        loop: the longest innermost loop's instructions by pipe ("tensor", "memory", "imad", "alu", "other").
    """

    registers: int
    stack: int
    instructions: int
    local: int
    tensor_core: int
    hgmma: int
    atomics: int
    narrow_loads: int
    rewritten: tuple[str, ...]
    loop: dict[str, int]

    @property
    def issue_slots(self) -> int:
        """Issue slots of a pass through the loop: one an instruction, or two an instruction of the busier half-rate pipe."""
        return max(sum(self.loop.values()), 2 * self.loop.get("alu", 0), 2 * self.loop.get("imad", 0))


def read_cubin(cubin: bytes) -> Sass:
    """Disassemble a cubin of one kernel and count.

    Raises:
        ValueError: the cubin holds no kernel, or more than one.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _USAGE.findall(_cuobjdump("-res-usage", file.name))
        instructions = [
            (int(address, 16), predicate, opcode, operands)
            for address, predicate, opcode, operands in _INSTRUCTION.findall(_cuobjdump("-sass", file.name))
            if opcode != "NOP"
        ]
    opcodes = Counter(opcode for _, _, opcode, _ in instructions)
    if len(usage) != 1 or not opcodes:
        raise ValueError(f"expected one kernel in the cubin, found {len(usage)} and {opcodes.total()} instructions")
    registers, stack = map(int, usage[0])
    return Sass(
        registers=registers,
        stack=stack,
        instructions=opcodes.total(),
        local=_count(opcodes, _LOCAL),
        tensor_core=_count(opcodes, _TENSOR_CORE),
        hgmma=_count(opcodes, re.compile(r"HGMMA\b")),
        atomics=_count(opcodes, re.compile(r"(?:ATOMG?|RED)\b")),
        narrow_loads=_count(opcodes, _NARROW_LOAD),
        rewritten=in_sass(instructions),
        loop=dict(Counter(map(_pipe, _longest_loop(instructions)))),
    )


def read_kernel(assembly: Mapping[str, Any]) -> Sass:
    """Count in what Triton compiled for one kernel, for an NVIDIA or an AMD GPU."""
    return read_cubin(assembly["cubin"]) if "cubin" in assembly else read_amdgcn(assembly["amdgcn"])


def read_amdgcn(assembly: str) -> Sass:
    """The same counts for an AMD GPU, from the assembly of one kernel.  Its loop is empty: those pipes are NVIDIA's.

    Raises:
        ValueError: the assembly does not say what the kernel uses.
    """
    used = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    if "vgpr_spill_count" not in used:
        raise ValueError("expected the assembly of a kernel with its metadata")
    opcodes = Counter(re.findall(r"^\s+([vs]_\w+|(?:global|buffer|scratch|ds|flat)_\w+)", assembly, re.MULTILINE))
    return Sass(
        registers=used["vgpr_count"],
        stack=max(used["private_segment_fixed_size"], 4 * used["vgpr_spill_count"]),
        instructions=opcodes.total(),
        local=_count(opcodes, re.compile("scratch_(?:load|store)")),
        tensor_core=_count(opcodes, re.compile("v_mfma_")),
        hgmma=0,
        atomics=_count(opcodes, re.compile("(?:global|buffer|flat)_atomic")),
        narrow_loads=_count(opcodes, re.compile(r"(?:global|buffer)_load_(?:u|s|d16|dword$)")),
        rewritten=(),
        loop={},
    )


def _longest_loop(instructions: list[tuple[int, str, str, str]]) -> list[str]:
    """The opcodes of the longest loop that holds no other.  A loop ends with a branch backwards."""
    branches = (
        (address, re.search(r"0x([0-9a-f]+)", operands))
        for address, _, opcode, operands in instructions
        if opcode.startswith("BRA")
    )
    loops = [(int(target[1], 16), address) for address, target in branches if target and int(target[1], 16) < address]
    innermost = [
        loop for loop in loops if not any(loop != other and loop[0] <= other[0] <= other[1] <= loop[1] for other in loops)
    ]
    bodies = ([opcode for address, _, opcode, _ in instructions if start <= address <= end] for start, end in innermost)
    return max(bodies, key=len, default=[])


def _pipe(opcode: str) -> str:
    return next(pipe for pipe, pattern in _PIPES.items() if pattern.match(opcode))


def _count(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for opcode, n in opcodes.items() if pattern.match(opcode))


def _cuobjdump(*arguments: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
