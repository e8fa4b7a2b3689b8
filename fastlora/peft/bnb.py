"""The accelerated forms of PEFT's layers for bitsandbytes. This module imports bitsandbytes."""

from peft.tuners.lora import bnb
from torch import nn

from fastlora.peft.fused import Fused


class FusedLinear8bitLt(Fused, bnb.Linear8bitLt):
    """`peft.tuners.lora.bnb.Linear8bitLt`, fused."""


class FusedLinear4bit(Fused, bnb.Linear4bit):
    """`peft.tuners.lora.bnb.Linear4bit`, fused."""


FUSED: dict[type[nn.Module], type[Fused]] = {bnb.Linear8bitLt: FusedLinear8bitLt, bnb.Linear4bit: FusedLinear4bit}
