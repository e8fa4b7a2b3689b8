"""`lora_linears`: several LoRA projections of one x, as the q, k and v of an attention, in one step."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import validation
from fastlora.blocks.group import Constants, LoraLinearsFunction
from fastlora.boundary import Setting, cast, changing, settle, unpack
from fastlora.quantized import QuantizedWeight

MASKS = ("separate", "shared")
MAX_PROJECTIONS = 256  # a mask's word is a byte of a constant of the kernels


class Projection(NamedTuple):
    """One linear with its LoRA bypass: the arguments of `lora_linear` without x.

    In `lora_mlp` a linear without an adapter has lora_A = lora_B = None.
    """

    weight: Tensor | QuantizedWeight
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    training: bool = True,
    seed: int | Tensor | None = None,
    masks: str = "separate",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """yᵢ = x Wᵢᵀ + biasᵢ + scalingᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ for every projection, with gradients as of `lora_linear`.

    The projections share passes over x, and dx = Σ dxᵢ is accumulated in one tensor.  Ranks, widths, scalings, rates, biases
    and dtypes of adapters may differ.  A pass serves up to four projections of one rate and one dtype of adapters.

    Args:
        x: (..., in), any strides.
        projections: at least one and at most 256 `Projection`s of the same in; see `lora_linear` for their fields.
        training: False turns dropout off.
        seed: one for all masks, as in `lora_linear`.
        masks: "separate" gives projection i the mask `dropout_mask(seed, M, in, p, projection=i)`, as PEFT draws one for each;
            "shared" gives all projections mask 0, each with its own rate.
        backend: as in `lora_linear`.  "fused" is the form of each y; dx is accumulated by cuBLAS in both forms.

    Returns:
        y (..., out) of each projection, in x's dtype.

    Raises:
        TypeError, ValueError: see `lora_linear`; the message begins with the projection.  No projection, or too many.
        RuntimeError: see `lora_linear`.
    """
    validation.check_tensor(x, "x")
    if not isinstance(projections, Sequence) or not all(isinstance(item, Projection) for item in projections):
        kinds = (
            [type(item).__name__ for item in projections] if isinstance(projections, Sequence) else type(projections).__name__
        )
        raise TypeError(f"projections must be a sequence of Projection, got {kinds}")
    if not 1 <= len(projections) <= MAX_PROJECTIONS:
        raise ValueError(f"projections must hold 1 to {MAX_PROJECTIONS} projections, got {len(projections)}")
    if masks not in MASKS:
        raise ValueError(f"masks must be one of {MASKS}, got {masks!r}")
    autocast = validation.autocast_dtype(x.device)
    for i, projection in enumerate(projections):
        validation.check_call(x, *projection, autocast, name=f"projections[{i}]")
    dropout_ps = [item.dropout_p for item in projections]
    setting = settle("lora_linears", x, dropout_ps, training, seed, backend, autocast)
    words = tuple(range(len(projections))) if masks == "separate" else (0,) * len(projections)
    x = cast(x, autocast)
    return LoraLinearsFunction.apply(x, setting.seed, *flatten(projections, words, setting, x.dtype, autocast))


def flatten(
    projections: Sequence[Any],
    words: tuple[int, ...],
    setting: Setting,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> tuple[Any, ...]:
    """Constants, then n weights, lora_A, lora_B and biases and the statistics, as a Function takes n checked projections.

    dtype: that of x after autocast.
    """
    weights, schemes, statistics = zip(*(unpack(item.weight, autocast) for item in projections), strict=True)
    lora_As = [cast(item.lora_A, autocast) for item in projections]
    lora_Bs, scalings = zip(*(changing(cast(item.lora_B, autocast), item.scaling) for item in projections), strict=True)
    biases = [None if item.bias is None else item.bias.to(dtype) for item in projections]
    lengths = tuple(map(len, statistics))
    constants = Constants(words, tuple(map(float, scalings)), setting.dropout_ps, setting.backend, schemes, lengths)
    return constants, *weights, *lora_As, *lora_Bs, *biases, *itertools.chain(*statistics)
