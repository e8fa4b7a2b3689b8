"""Stand-in."""
from typing import NamedTuple
import torch
from fastlora.functional import lora_linear
from fastlora.dropout import draw_seed
class Projection(NamedTuple):
    weight: object
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
def lora_linears(x, projections, *, training=True, seed=None, masks="separate", backend=None):
    if seed is None and any(p.dropout_p for p in projections): seed = draw_seed(x.device)
    return tuple(lora_linear(x, *p[:4], scaling=p.scaling, dropout_p=p.dropout_p, training=training, seed=seed, backend=backend) for p in projections)
