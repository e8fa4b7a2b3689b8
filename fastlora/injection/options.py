"""The options of `inject`, checked as far as that needs no model."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora import validation
from fastlora.layers.slices import check_enabled
from fastlora.quantized import KINDS

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What to inject; see `inject`, which leaves them on the model as `model.lora_options`.

    Raises TypeError or ValueError for options that no model could fulfil.
    """

    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] | None = ()
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
    use_dora: bool = False
    fan_in_fan_out: bool | None = None
    adapter_dtype: torch.dtype | None = None
    quantize: str | None = None
    enable_lora: Mapping[str, Sequence[bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("target_modules", "exclude_modules", "modules_to_save"):
            names = getattr(self, option)
            object.__setattr__(self, option, () if names is None and option != "target_modules" else _listed(names, option))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        for name, r in {"r": self.r, **self._of_pattern("rank_pattern")}.items():
            validation.check_size(r, name)
            if r < 1:
                raise ValueError(f"{name} must be >= 1, got {r}: a model without adapters needs no injection")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self._of_pattern("alpha_pattern")}.items():
            validation.check_number(alpha, name)
        layers = self.layers_to_transform
        for index in (layers,) if isinstance(layers, int) else layers or ():
            validation.check_size(index, "layers_to_transform")
        for name, enabled in self._of_pattern("enable_lora").items():
            check_enabled(enabled, name)
        validation.check_dropout_p(self.lora_dropout, "lora_dropout")
        validation.check_flag(self.use_rslora, "use_rslora")
        validation.check_flag(self.use_dora, "use_dora")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}")
        if self.quantize not in (None, *KINDS):
            raise ValueError(f"quantize must be None or one of {', '.join(map(repr, KINDS))}, got {self.quantize!r}")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list, got a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")

    def of_layer(self, name: str) -> dict[str, Any]:
        """What `FusedLoraLinear` takes for the layer `name`; its rank and alpha are those of the first pattern that matches."""
        ranks = (r for key, r in self.rank_pattern.items() if pattern_matches(key, name))
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if pattern_matches(key, name))
        slices = [{"enable_lora": enabled} for key, enabled in self.enable_lora.items() if pattern_matches(key, name)]
        same = {option: getattr(self, option) for option in ("lora_dropout", "use_rslora", "use_dora", "adapter_dtype")}
        return {"r": next(ranks, self.r), "lora_alpha": next(alphas, self.lora_alpha), **same, **(slices[0] if slices else {})}

    def _of_pattern(self, pattern: str) -> dict[str, Any]:
        """The values of a pattern, under the names that error messages give them."""
        values = {} if getattr(self, pattern) is None else getattr(self, pattern)
        if not isinstance(values, Mapping):
            raise TypeError(f"{pattern} must be a dict of a regex and a value for what it matches, got {values!r}")
        object.__setattr__(self, pattern, dict(values))
        return {f"{pattern}[{key!r}]": value for key, value in values.items()}


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern, a regex, matches `name` or an end of it."""
    return compile_regex(rf"(.*\.)?({key})$", f"the pattern's key {key!r}").match(name) is not None


def compile_regex(pattern: str, what: str) -> re.Pattern[str]:
    """The compiled regex.  Raises ValueError that names `what` it was given as."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from error


def _listed(names: Any, option: str) -> str | tuple[str, ...]:
    """A string as it is, other names as a tuple."""
    if isinstance(names, str):
        return names
    listed = (names,) if isinstance(names, Mapping) or not isinstance(names, Iterable) else tuple(names)
    if not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{option} must be a string or a list of strings, got {names!r}")
    return listed
