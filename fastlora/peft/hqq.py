"""The accelerated form of PEFT's layer for HQQ, which PEFT has where hqq is installed."""

from peft.tuners.lora.hqq import HqqLoraLinear
from torch import nn

from fastlora.peft.fused import Fused


class FusedHqqLinear(Fused, HqqLoraLinear):
    """`peft.tuners.lora.hqq.HqqLoraLinear`, fused."""


FUSED: dict[type[nn.Module], type[Fused]] = {HqqLoraLinear: FusedHqqLinear}
