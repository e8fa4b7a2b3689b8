"""`EagerLoraLinear`: the LoRA linear that the fused one is compared with."""

from torch import Tensor

from fastlora import oracle
from fastlora.dropout import draw_seed, threshold
from fastlora.modules import FusedLoraLinear


class EagerLoraLinear(FusedLoraLinear):
    """LoRA as PEFT computes it: separate torch operations, each of which saves its own tensors for backward.

    It draws its seed as FusedLoraLinear does: the same generator state gives the same mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.merged or self.lora_A is None:
            return super().forward(x)
        p = self.lora_dropout if self.training else 0.0
        seed = draw_seed(x.device) if threshold(p) else 0
        tensors = x, self._W(), self.lora_A, self.lora_B, self.bias
        return oracle.masked_reference()(*tensors, scaling=self.scaling, dropout_p=p, seed=seed)
