"""The options of `inject`, checked as far as that needs no model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.quantized import KINDS

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What to inject; see `inject`, which leaves them on the model as `model.lora_options`.

    Raises TypeError or ValueError for options that no model could fulfil.
    """

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool | None = None
    adapter_dtype: torch.dtype | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if isinstance(r, int) and r < 1:  # another type is refused where the layer is made
                raise ValueError(f"{name} must be >= 1, got {r}: a model without adapters needs no injection")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}")
        if self.quantize not in (None, *KINDS):
            raise ValueError(f"quantize must be None or one of {', '.join(map(repr, KINDS))}, got {self.quantize!r}")
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list, got a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")


def listed(names: str | Iterable[str], option: str) -> str | tuple[str, ...]:
    """Names given as `option`: a string as it is, others as a tuple.  Raises TypeError for what is no string."""
    if isinstance(names, str):
        return names
    listed = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{option} must be a string or a list of strings, got {names!r}")
    return listed


def values_by_regex(pattern: Mapping[str, Any] | None, option: str) -> dict[str, Any]:
    """A copy of the dict given as `option`.  Raises TypeError for another type."""
    if not isinstance(pattern, Mapping | None):
        raise TypeError(f"{option} must be a dict of a regex and a value for what it matches, got {pattern!r}")
    return dict(pattern or {})
