"""Is the fused run right?  Two checks, each with a bound that is measured.

**Layers.** `check_layers` takes the activations and gradients of one batch in the trained model.  On these it compares y, dx,
dA and dB of every LoRA layer with float64 under the same mask, and `fastlora.oracle` judges: the error may be twice that of
eager torch in the same dtypes, or a few roundings.  The model as a whole has no float64 reference, because transformers' norms
compute in float32.

**Curves.** Training amplifies rounding errors, so two correct runs drift apart.  How far depends on the model, the text, the
dtype and the number of steps.  The control run measures it: it repeats the eager run, and `disturb` adds noise to y, dx, dA and
dB of every LoRA layer in every step, as large as the oracle would still accept.  The bound is twice the distance between the
control's and the eager loss curve.  The factor is two because in chaotic training all correct curves end about equally far
apart, and chance decides which two are closest.  A fused curve beyond the bound has an error that rounding does not explain.
The distance is the root mean square over the steps: unlike the maximum, it does not depend on a single step.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastlora import oracle
from fastlora.dropout import draw_seed
from fastlora.finetune.model import next_token_loss
from fastlora.modules import FusedLoraLinear

OUTPUTS = ("y", "dx", "dA", "dB")


def check_layers(model: nn.Module, ids: Tensor, seed: int) -> dict[str, list[oracle.Row]]:
    """The verdicts on OUTPUTS of every LoRA layer that the loss depends on, by its name, from one training step on `ids`.

    Of several calls of a layer, the first one counts.
    """
    met: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # x and dy

    def watch(layer: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if isinstance(layer, FusedLoraLinear) and y.requires_grad:
            y.register_hook(lambda dy: met.__setitem__(layer, (args[0].detach(), dy)))  # the first call comes last, and stays

    torch.manual_seed(seed)
    with nn.modules.module.register_module_forward_hook(watch):
        next_token_loss(model.train(), ids).mean().backward()
    model.zero_grad()
    return {name: _judge(layer, *met[layer], seed) for name, layer in model.named_modules() if layer in met}


def disturb(model: nn.Module, verdicts: dict[str, list[oracle.Row]], seed: int) -> None:
    """Make `model` the control: from now on each judged output gets noise, as large, relative to it, as its row's bound."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, rows in verdicts.items():
        layer: Any = model.get_submodule(name)
        y, dx, dA, dB = (partial(_add_noise, row.bound, generator) for row in rows)
        layer.lora_A.register_hook(dA)
        layer.lora_B.register_hook(dB)
        layer.register_full_backward_hook(partial(_hook_dx, dx))
        layer.register_forward_hook(lambda layer, args, result, noisy=y: noisy(result))


def distance(curve: list[float], other: list[float]) -> float:
    """The root mean square over steps of the difference of two loss curves; infinite or NaN when a loss is."""
    return math.dist(curve, other) / math.sqrt(len(curve))


def curve_bound(control: list[float], eager: list[float], dtype: torch.dtype) -> float:
    """The largest accepted distance from the eager curve: twice that of the control, or the rounding of the loss itself."""
    return max(oracle.EAGER_FACTOR * distance(control, eager), oracle.FLOOR[dtype, dtype] * max(eager))


def _judge(layer: Any, x: Tensor, dy: Tensor, seed: int) -> list[oracle.Row]:
    def function(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: float) -> Tensor:
        torch.manual_seed(seed)
        return functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    torch.manual_seed(seed)
    mask_seed = int(draw_seed(x.device))
    inputs = oracle.Inputs(x, layer._W(), layer.lora_A, layer.lora_B, layer.bias, dy, mask_seed)
    shape, dtypes = (x[..., 0].numel(), layer.in_features, layer.out_features), (x.dtype, layer.lora_A.dtype)
    case = oracle.Case(shape, layer.r, *dtypes, layer.bias is not None, dropout_p=layer.lora_dropout, scaling=layer.scaling)
    return oracle.Judge(case, [inputs], OUTPUTS, oracle.masked_reference()).rows(function)


def _add_noise(size: float, generator: torch.Generator, t: Tensor) -> Tensor:
    """t + noise with ‖noise‖ ≈ size · ‖t‖; the noise is uniform, which a CPU draws fastest."""
    noise = torch.empty_like(t, dtype=torch.float32).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    noise *= size * t.detach().float().square().mean().sqrt()
    return t + noise.to(t.dtype)


def _hook_dx(noisy: partial[Tensor], layer: nn.Module, grads: tuple[Tensor | None], _: tuple[Tensor]) -> tuple[Tensor | None]:
    (dx,) = grads
    return (None if dx is None else noisy(dx),)  # x may require no gradient
