"""wgmma sees what cp.async copied: between the two stands a fence, Triton's own or, before 3.7, that of dot.py."""

import pytest

from tools.aot import offline
from tools.cases import CompileCase


def unfenced(ptx: str) -> list[str]:
    """The first wgmma behind each wait for copies with no fence between them."""
    found, copied = [], False
    for line in ptx.splitlines():
        if "cp.async.wait_group" in line:
            copied = True
        elif "fence.proxy.async" in line:
            copied = False
        elif copied and "wgmma.mma_async" in line:
            found.append(line)
            copied = False
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_copies_are_fenced(step: str, dropout_p: float) -> None:
    with offline(90) as launches:
        CompileCase(step, "bfloat16", 16, 90).run(dropout_p)
    code = {launch.kernel: launch.compiled.asm["ptx"] for launch in launches}
    assert any("cp.async.wait_group" in ptx and "wgmma.mma_async" in ptx for ptx in code.values())
    assert {kernel: unfenced(ptx) for kernel, ptx in code.items() if unfenced(ptx)} == {}
