"""`lora_linears`: several LoRA projections of one x, as the q, k and v of an attention, in one step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import validation
from fastlora.blocks.group import Constants, LoraLinearsFunction
from fastlora.dropout import draw_seed, threshold
from fastlora.functional import _autocast_dtype, _choose_backend
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
    autocast_dtype = _autocast_dtype(x.device)
    for i, projection in enumerate(projections):
        try:
            validation.check_inputs(x, *projection[:4], autocast_dtype)  # type: ignore[arg-type]  # None is refused
            validation.check_number(projection.scaling, "scaling")
            validation.check_dropout_p(projection.dropout_p, "dropout_p")
        except (TypeError, ValueError) as error:
            raise type(error)(f"projections[{i}]: {error}") from None
    validation.check_seed(seed, x.device)
    dtype = validation.autocast_target(x, autocast_dtype)
    backend = _choose_backend(backend, x.device, dtype)
    if validation.is_transformed():
        raise RuntimeError("lora_linears does not support functorch transforms (torch.func.grad, vmap, jvp, ...)")
    rates = [float(projection.dropout_p) if training and threshold(projection.dropout_p) else 0.0 for projection in projections]
    if not any(rates):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)  # without a copy from the host

    x, weights, lora_As, lora_Bs, schemes, statistics = _cast(x, autocast_dtype), [], [], [], [], []
    for weight, lora_A, lora_B, *_ in projections:
        weights.append(weight.packed if isinstance(weight, QuantizedWeight) else _cast(weight, autocast_dtype))
        schemes.append(weight.scheme if isinstance(weight, QuantizedWeight) else None)
        statistics.append(weight.statistics if isinstance(weight, QuantizedWeight) else ())
        lora_As.append(_cast(lora_A, autocast_dtype))
        lora_Bs.append(_cast(lora_B, autocast_dtype))
    biases = [None if item.bias is None else item.bias.to(dtype) for item in projections]
    words = tuple(range(len(projections))) if masks == "separate" else (0,) * len(projections)
    scalings, lengths = tuple(float(item.scaling) for item in projections), tuple(map(len, statistics))
    constants = Constants(words, scalings, tuple(rates), backend, tuple(schemes), lengths)
    flat = (tensor for own in statistics for tensor in own)
    return LoraLinearsFunction.apply(x, seed, constants, *weights, *lora_As, *lora_Bs, *biases, *flat)


def _cast(tensor: Any, autocast_dtype: torch.dtype | None) -> Tensor:
    result: Tensor = tensor.to(validation.autocast_target(tensor, autocast_dtype))
    return result
