"""Float32 operands that reach the tensor cores through registers are rounded by cvt.rna.tf32, the others by descriptors."""

import pytest

from tools.aot import offline
from tools.cases import CompileCase


@pytest.mark.parametrize("step", ["forward", "addmm-backward"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_conversions(step: str, capability: int) -> None:
    with offline(capability) as launches:
        CompileCase(step, "float32-tf32", 16, capability).run(0.0)
    for launch in launches:
        ttir = launch.compiled.asm["ttir"]
        conversions = ttir.count("cvt.rna.tf32.f32") + 2 * launch.constexprs.get("ROUNDED", False)
        assert conversions == 2 * ttir.count("tt.dot "), launch.kernel
    assert any("tt.dot " in launch.compiled.asm["ttir"] for launch in launches)
