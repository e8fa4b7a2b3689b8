"""`EagerLoraLinear`: the LoRA linear to compare with."""

from torch import Tensor

from fastlora import reference
from fastlora.dropout import draw_seed, threshold
from fastlora.functional import dropout_mask
from fastlora.modules import FusedLoraLinear


class EagerLoraLinear(FusedLoraLinear):
    """The layer as PEFT computes it: separate torch operations, with what autograd keeps for each of them.

    It draws its seed as FusedLoraLinear does, so with equal generator states both see the same mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged or self.lora_A is None or self.lora_B is None:
            return super().forward(x)
        keep_mask, dropout_p = None, self.lora_dropout if self.training else 0.0
        if threshold(dropout_p) > 0:
            rows = x.numel() // max(x.shape[-1], 1)
            keep_mask = dropout_mask(draw_seed(x.device), rows, x.shape[-1], dropout_p)
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return reference.lora_linear(
            x, weight, self.lora_A, self.lora_B, self.bias, scaling=self.scaling, dropout_p=dropout_p, keep_mask=keep_mask
        )
