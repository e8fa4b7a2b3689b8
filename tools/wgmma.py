"""Find registers of a wgmma that are rewritten while the wgmma may still use them (capability 90).

wgmma runs beside the warps that issue it.  It reads its first operand, where that lies in registers, and updates its
accumulator until a wait covers it: `wgmma.wait_group N` returns once at most N committed groups are unfinished.  By the PTX ISA
a write to these registers before the wait is undefined.  Triton 3.6 and 3.7 can wait with one group in flight, and the next
iteration of the loop then rewrites the operand (Triton issue 9433).

The check reads PTX, where the rule is stated for every ptxas, and the machine code, where ptxas has chosen the registers.  From
each wgmma it follows every path to the first wait that covers it.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """What matters here of one instruction of PTX or of machine code.

    Attributes:
        writes: the registers that it writes, none for a wgmma.
        uses: the registers of a wgmma: its first operand, where that is in registers, and its accumulator.
        commits: it ends a group.
        wait: the number of groups that may be unfinished after it.  None for all but waits.
        target: the index of the instruction that it branches to.
        falls_through: the next instruction may follow it.
    """

    text: str
    writes: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    commits: bool = False
    wait: int | None = None
    target: int | None = None
    falls_through: bool = True


def rewrites(code: Sequence[Instruction]) -> tuple[str, ...]:
    """For each wgmma whose registers are rewritten too early, the registers and both instructions."""
    return tuple(found for at, instruction in enumerate(code) if instruction.uses and (found := _first_rewrite(code, at)))


def _first_rewrite(code: Sequence[Instruction], wgmma: int) -> str:
    """Empty when each path has a wait before the first write.  A wait covers a group that more than `wait` commits follow."""
    least: dict[int, int] = {}  # instruction -> the fewest groups committed on a path to it: those paths are covered last
    paths = [(wgmma + 1, int(code[wgmma].commits))]
    while paths:
        at, groups = paths.pop()
        if at >= len(code) or least.get(at, groups + 1) <= groups:
            continue
        least[at] = groups
        instruction = code[at]
        if instruction.wait is not None and groups > instruction.wait:
            continue
        if rewritten := instruction.writes & code[wgmma].uses:
            return f"{', '.join(sorted(rewritten))} of `{code[wgmma].text}` by `{instruction.text}`"
        groups += instruction.commits
        if instruction.target is not None:
            paths.append((instruction.target, groups))
        if instruction.falls_through:
            paths.append((at + 1, groups))
    return ""


# "@%p2 bra $L__BB0_1": predicate, if any, opcode, operands.  Braces that open or close a scope go before it.
_STATEMENT = re.compile(r"^[{}\s]*(@\S+\s+)?([a-z][\w.:]*)\s*(.*)")
_VECTOR, _VIRTUAL = re.compile(r"\{[^}]*\}"), re.compile(r"%\w+")


def in_ptx(text: str) -> tuple[str, ...]:
    """`rewrites` of a kernel's PTX.  A virtual register of a loop is rewritten where the next iteration defines it again."""
    if "wgmma" not in text:
        return ()
    statements: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition("//")[0].strip()
        if label := re.fullmatch(r"([$\w]+):", line):
            labels[label[1]] = len(statements)
        for statement in line.split(";")[:-1]:
            statements += _STATEMENT.findall(statement)
    return rewrites([_from_ptx(predicate, opcode, operands, labels) for predicate, opcode, operands in statements])


def _from_ptx(predicate: str, opcode: str, operands: str, labels: dict[str, int]) -> Instruction:
    text = f"{opcode} {operands}"
    if opcode.startswith("wgmma.mma_async"):
        return Instruction(text, uses=frozenset(_VIRTUAL.findall(" ".join(_VECTOR.findall(operands)))))
    destination = _VECTOR.match(operands) or _VIRTUAL.match(operands)
    return Instruction(
        text,
        writes=frozenset(_VIRTUAL.findall(destination[0])) if destination else frozenset(),
        commits=opcode.startswith("wgmma.commit_group"),
        wait=int(operands) if opcode.startswith("wgmma.wait_group") else None,
        target=labels[operands] if opcode.startswith("bra") else None,
        falls_through=bool(predicate) or not opcode.startswith(("bra", "ret", "exit")),
    )


# "R24, R28, gdesc[UR12], R24, gsb0": accumulator and first operand.  Descriptors alone are a wgmma on shared memory.
_HGMMA = re.compile(r"HGMMA(?:\.SP)?\.64x(\d+)x\d+\.(F16|F32)")
_OPERAND_REGISTERS = 4  # of 64 rows and 32 bytes a row, over 128 threads
_PHYSICAL = re.compile(r"\s*(?:U?P[T\d],\s*)*R(\d+)\b")
# Their first register is a source.
_WITHOUT_DESTINATION = re.compile(r"\w*SETP|FCHK|BAR|BRX|WARPSYNC|NANOSLEEP|CALL|RET")
_WIDTHS = (
    (4, re.compile(r".*\.128\b|LDSM.*88\.4|HMMA.*\.F32")),
    (2, re.compile(r".*\.64\b|.*\.WIDE|LDSM.*88\.2|HMMA|CS2R$|D(?:ADD|MUL|FMA)")),
    (1, re.compile("")),
)


def in_sass(code: Sequence[tuple[int, str, str, str]]) -> tuple[str, ...]:
    """`rewrites` of machine code: (address, predicate, opcode, operands) of each instruction."""
    addresses = [address for address, *_ in code]
    return rewrites([_from_sass(predicate, opcode, operands, addresses) for _, predicate, opcode, operands in code])


def _from_sass(predicate: str, opcode: str, operands: str, addresses: list[int]) -> Instruction:
    text = f"{opcode}{operands.rstrip()}"
    if tile := _HGMMA.match(opcode):
        accumulator = int(tile[1]) // (2 if tile[2] == "F32" else 4)
        first, second = (_PHYSICAL.match(operand) for operand in operands.split(",")[:2])
        uses = _range(first, accumulator) | _range(second, _OPERAND_REGISTERS)
        return Instruction(text, uses=uses, commits="gsb0" in operands)
    wait = re.search(r"gsb0, 0x([0-9a-f]+)", operands) if opcode.startswith("WARPGROUP.DEPBAR") else None
    target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
    width = next(width for width, pattern in _WIDTHS if pattern.match(opcode))
    return Instruction(
        text,
        writes=_range(None if _WITHOUT_DESTINATION.match(opcode) else _PHYSICAL.match(operands), width),
        wait=int(wait[1], 16) if wait else None,
        target=bisect_left(addresses, int(target[1], 16)) if target else None,
        falls_through=bool(predicate) or not opcode.startswith(("BRA", "EXIT", "RET")),
    )


def _range(first: re.Match[str] | None, count: int) -> frozenset[str]:
    return frozenset(f"R{int(first[1]) + offset}" for offset in range(count)) if first else frozenset()
