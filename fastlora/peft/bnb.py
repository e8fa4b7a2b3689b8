"""The accelerated forms of PEFT's layers on linears of bitsandbytes, which this module imports."""

from peft.tuners.lora import bnb
from torch import nn

from fastlora.peft.layers import Fused

FUSED: dict[type[nn.Module], type[Fused]] = {}

if hasattr(bnb, "Linear8bitLt"):

    class FusedLinear8bitLt(Fused, bnb.Linear8bitLt):
        """`peft.tuners.lora.bnb.Linear8bitLt`, fused."""

    FUSED[bnb.Linear8bitLt] = FusedLinear8bitLt

if hasattr(bnb, "Linear4bit"):

    class FusedLinear4bit(Fused, bnb.Linear4bit):
        """`peft.tuners.lora.bnb.Linear4bit`, fused."""

    FUSED[bnb.Linear4bit] = FusedLinear4bit
