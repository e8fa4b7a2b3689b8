"""A write to registers that a wgmma in flight may still use is seen, in PTX and in machine code."""

from dataclasses import replace

import pytest
import torch
from planned import run_shrink

from fastlora.kernels.target import Target
from tools.aot import offline
from tools.cases import TARGETS
from tools.sass import read_cubin
from tools.wgmma import in_ptx, in_sass


@pytest.mark.parametrize("waits", [True, False])
def test_the_masked_shrink_needs_its_wait(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton issue 9433, in the kernel that `WAIT_FOR_DOT` cures.  One multiprocessor makes the tile tall enough for wgmma.

    The fault is in the PTX.  From it ptxas makes code with the same fault (Triton 3.6.0), or waits after each wgmma (3.7.1).
    """
    monkeypatch.setattr(Target, "has_register_operands", waits)
    x, A = (torch.empty(rows, 192, dtype=torch.bfloat16, device="meta") for rows in (96, 16))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    with offline(90) as launches:
        run_shrink(x, A, replace(TARGETS[90], sms=1), seed=seed, dropout_p=0.1)
    assembly = launches[0].compiled.asm
    sass = read_cubin(assembly["cubin"])
    assert launches[0].constexprs["WAIT_FOR_DOT"] == waits
    assert sass.hgmma
    assert bool(in_ptx(assembly["ptx"])) != waits
    assert not (waits and sass.rewritten)


# Each iteration of the loop writes the operand's registers, then a wgmma on them ends a group.  AFTER stands for what follows.
PTX = """
    mov.b32     %r9, 0;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r10];
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, %rd1, %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    AFTER
$L__BB0_2:
    @%p2 bra    $L__BB0_1;
    wgmma.wait_group.sync.aligned 0;
    mov.b32     %r5, %r1;
    ret;
"""
OTHER_PTX = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r11,%r12,%r13,%r14}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
OTHER_PTX += " wgmma.commit_group.sync.aligned;"
SASS = """
    MOV R9, RZ
    LDSM.16.M88.4 R28, [R10]
    HGMMA.64x8x16.F32.BF16 R24, R28, gdesc[UR12], R24, gsb0
    AFTER
    @P2 BRA 0x10
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    MOV R28, R24
    EXIT
"""
OTHER_SASS = "HGMMA.64x8x16.F32.BF16 R32, gdesc[UR12], R32, gsb0"
# What comes after the wgmma in PTX and in machine code, and the registers that are rewritten: the operand's first, the
# accumulator's second, or none.
AFTER = {
    "no wait": ("", "", "operand"),
    "a wait": ("wgmma.wait_group.sync.aligned 0;", "WARPGROUP.DEPBAR.LE gsb0, 0x0", ""),
    "a wait with one group in flight": ("wgmma.wait_group.sync.aligned 1;", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "operand"),
    "another group, and a wait with one in flight": (
        f"{OTHER_PTX} wgmma.wait_group.sync.aligned 1;",
        f"{OTHER_SASS}\n WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "",
    ),
    "a wait on one of two paths": (
        "@%p3 bra $L__BB0_2; wgmma.wait_group.sync.aligned 0;",
        "@P3 BRA 0x50\n WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "operand",
    ),
    "a read, then a wait": (
        "mov.b32 %r9, %r5; st.shared.b32 [%r10], %r5; wgmma.wait_group.sync.aligned 0;",
        "MOV R9, R28\n STS [R10], R28\n ISETP.GE.AND P2, PT, R28, R9, PT\n WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "",
    ),
    "a write to the accumulator, then a wait": (
        "mov.b64 {%r9, %r2}, %rd3; wgmma.wait_group.sync.aligned 0;",
        "SHFL.BFLY PT, R25, R9, 0x1, 0x1f\n WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "accumulator",
    ),
}


@pytest.mark.parametrize("after", AFTER)
def test_paths_to_a_wait(after: str) -> None:
    ptx, sass, rewritten = AFTER[after]
    lines = [line.split() for line in SASS.replace("AFTER", sass).splitlines() if line.strip()]
    predicated = [("" if line[0][0] != "@" else line.pop(0), line) for line in lines]
    code = [(16 * at, predicate, line[0], " " + " ".join(line[1:])) for at, (predicate, line) in enumerate(predicated)]
    found_ptx = [found.partition(" of ")[0] for found in in_ptx(PTX.replace("AFTER", ptx))]
    found_sass = [found.partition(" of ")[0] for found in in_sass(code)]
    assert found_ptx == {"operand": ["%r5, %r6, %r7, %r8"], "accumulator": ["%r2"], "": []}[rewritten]
    assert found_sass == {"operand": ["R28, R29, R30, R31"], "accumulator": ["R25"], "": []}[rewritten]
