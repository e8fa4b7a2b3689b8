"""Is the fused run right?  Two questions, each with a bound that comes from data.

**Each layer.** On the activations and gradients of one batch in the trained model, y, dx, dA and dB of every LoRA layer are
compared with float64 under the same mask and judged by `fastlora.oracle`: at most twice the error of eager torch in the same
dtypes, or below a floor of a few roundings. (The model as a whole has no float64 truth: transformers' own norms compute in
float32.)

**The curves.** Training amplifies rounding errors, so two correct runs drift apart; how far depends on model, text, dtype and
number of steps. The control run measures it: the eager run again, but at each step noise is added to y, dx, dA and dB of
every LoRA layer, of the very size that the oracle would just let pass. Twice the distance of the control's loss curve from
the eager one is the bound, the oracle's factor again: where training is chaotic, any two correct curves end up about
equally far apart, and which is nearer is luck. A fused curve beyond the bound is not the work of rounding. Distance is the
root of the mean square over steps; the largest difference would hang on a single step.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastlora import oracle
from fastlora.dropout import draw_seed, threshold
from fastlora.finetune.model import next_token_loss
from fastlora.modules import FusedLoraLinear

OUTPUTS = ("y", "dx", "dA", "dB")


@dataclass(frozen=True)
class LayerError:
    """The verdict on one output of one layer; errors are ‖t − ref‖ / ‖ref‖."""

    layer: str
    output: str
    error: float
    eager: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.bound


def check_layers(model: nn.Module, ids: Tensor, seed: int) -> tuple[list[LayerError], list[str]]:
    """Judge every LoRA layer of `model` on what it meets in one training step on `ids`.

    Returns the verdicts, and the names of the layers that have none because the loss does not depend on them.
    """
    met = _activations(model, ids, seed)
    layers = dict(_lora_layers(model))
    errors = [error for name, layer in layers.items() if name in met for error in _check_layer(name, layer, *met[name], seed)]
    return errors, [name for name in layers if name not in met]


def disturb(model: nn.Module, errors: list[LayerError], seed: int) -> None:
    """Make `model` a control: from now on noise of relative norm `bound` is added to each output that `errors` lists."""
    bounds = {(error.layer, error.output): error.bound for error in errors}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, layer in _lora_layers(model):
        if (name, "y") not in bounds:  # a layer that was not reached has none
            continue
        y, dx, dA, dB = (_noise(bounds[name, output], generator) for output in OUTPUTS)
        lora_A, lora_B = _adapters(layer)
        lora_A.register_hook(dA)
        lora_B.register_hook(dB)
        layer.register_forward_pre_hook(_on_gradient_of_input(dx))
        layer.register_forward_hook(_on_output(y))


def distance(curve: list[float], other: list[float]) -> float:
    """The root mean square over steps of the difference of two loss curves; infinite when either is not finite."""
    if not all(map(math.isfinite, (*curve, *other))):
        return math.inf
    return statistics.fmean((a - b) ** 2 for a, b in zip(curve, other, strict=True)) ** 0.5


def curve_bound(control: list[float], eager: list[float], dtype: torch.dtype) -> float:
    """How far from the eager curve a correct one may be: twice the control's distance, or the rounding of the loss itself."""
    return max(oracle.EAGER_FACTOR * distance(control, eager), oracle.FLOOR[dtype, dtype] * max(eager))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, FusedLoraLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FusedLoraLinear))


def _adapters(layer: FusedLoraLinear) -> tuple[nn.Parameter, nn.Parameter]:
    assert layer.lora_A is not None  # inject makes no layer of rank 0
    assert layer.lora_B is not None
    return layer.lora_A, layer.lora_B


def _activations(model: nn.Module, ids: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The (x, dy) of every LoRA layer that the loss of one training step on `ids` depends on, without an update.

    Of several calls of a layer it is the first: its gradient comes last.
    """
    met: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            if y.requires_grad:
                y.register_hook(lambda dy: met.__setitem__(name, (x, dy)))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in _lora_layers(model)]
    model.train()
    torch.manual_seed(seed)
    next_token_loss(model, ids).mean().backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return met


def _check_layer(name: str, layer: FusedLoraLinear, x: Tensor, dy: Tensor, seed: int) -> list[LayerError]:
    def as_trained(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        torch.manual_seed(seed)
        return functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    lora_A, lora_B = _adapters(layer)
    torch.manual_seed(seed)
    case = oracle.Case(
        (x.numel() // layer.in_features, layer.in_features, layer.out_features),
        layer.r,
        x.dtype,
        lora_A.dtype,
        bias=layer.bias is not None,
        dropout_p=layer.lora_dropout,
        scaling=layer.scaling,
    )
    inputs = oracle.Inputs(
        x,
        layer.weight,
        lora_A.detach(),
        lora_B.detach(),
        layer.bias,
        dy,
        seed=int(draw_seed(x.device)) if threshold(layer.lora_dropout) else 0,
    )
    reference = oracle.masked_reference()
    truth = oracle.evaluate(reference, case, inputs.double(), OUTPUTS)
    eager = oracle.evaluate(reference, case, inputs, OUTPUTS)
    result = oracle.evaluate(as_trained, case, inputs, OUTPUTS)
    return [_judge(name, output, case, result[output], eager[output], truth[output]) for output in OUTPUTS]


def _judge(
    layer: str, output: str, case: oracle.Case, result: Tensor | None, eager: Tensor | None, truth: Tensor | None
) -> LayerError:
    """The oracle's rule; no result, or one of another dtype than eager's, is wrong."""
    assert eager is not None  # the reference has every gradient
    assert truth is not None
    error = oracle.relative_error(result, truth) if result is not None and result.dtype == eager.dtype else math.inf
    eager_error = oracle.relative_error(eager, truth)
    floor = oracle.FLOOR[case.dtype, case.dtype_of(output)]
    bound = max(oracle.EAGER_FACTOR * eager_error, floor) if math.isfinite(eager_error) else floor
    return LayerError(layer, output, error, eager_error, bound)


def _noise(bound: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """t -> t + noise with ‖noise‖ = bound · ‖t‖, up to chance; uniform noise, which a CPU draws fastest."""

    def add(t: Tensor) -> Tensor:
        noise = torch.empty_like(t, dtype=torch.float32).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        noise *= bound * t.detach().float().square().mean().sqrt()
        return t + noise.to(t.dtype)

    return add


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda layer, args, y: change(y)


def _on_gradient_of_input(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor]]:
    """A forward pre-hook that applies `change` to the gradient which this layer, and no other user of x, sends back to x."""

    def hook(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].view_as(args[0])
        if x.requires_grad:
            x.register_hook(change)
        return (x,)

    return hook
