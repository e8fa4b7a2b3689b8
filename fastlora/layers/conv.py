"""`FusedLoraConv`: a frozen convolution with a LoRA update, in PEFT's semantics."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import validation
from fastlora.boundary import changing
from fastlora.functional import lora_linear
from fastlora.layers.base import FusedLoraLayer

_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class FusedLoraConv(FusedLoraLayer):
    """y = W * x + bias + scaling · B * (A * dropout(x)), W and bias frozen; dropout in training mode only.

    A (r, in, *kernel) convolves like W, with its stride, padding and dilation, over all channels; B (out, r / groups, 1, ...)
    is pointwise.  A is drawn from kaiming_uniform(a=√5) and B is zero, as in `peft.tuners.lora.layer.Conv2d`.  With groups the
    update is no convolution of W's form and cannot be merged, as in PEFT.

    A convolution whose windows do not overlap and have no padding, such as a pointwise one or the patches of a vision
    transformer, is a linear on a view of x.  It runs through `lora_linear`.

    Attributes:
        weight (out, in / groups, *kernel); bias (out,) or None; lora_A; lora_B; see `FusedLoraLayer` for the others.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    backend: str | None = None  # set it to choose the backend of `lora_linear` for this module

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        **options: Any,
    ) -> Self:
        """Wrap an nn.Conv1d, nn.Conv2d or nn.Conv3d: weight and bias share the storage of its, and the training mode is kept.

        Args:
            r: rank, a multiple of the convolution's groups.
            lora_alpha, lora_dropout, use_rslora, merge_weights, adapter_dtype: as in `FusedLoraLinear`.

        Raises:
            TypeError, ValueError: `module` is of another class, has hooks or a parametrisation, or pads by other values than
                zero; r is no multiple of groups; merge_weights with groups; or an argument is out of range.
        """
        if type(module) not in _TYPES:
            kinds = ", ".join(f"nn.{kind.__name__}" for kind in _TYPES)
            raise TypeError(f"module must be one of {kinds} and no subclass of them, got {type(module).__name__}")
        validation.check_unaltered(module, "module")
        conv: Any = module
        if conv.padding_mode != "zeros" and any(_padding(conv)):
            raise ValueError(f"module has padding_mode={conv.padding_mode!r}, expected 'zeros', with which PEFT pads for A")
        validation.check_rank(r, conv.weight[0].numel() * conv.groups, conv.out_channels, stacklevel=3)
        if r % conv.groups:
            raise ValueError(f"r={r} must be a multiple of the convolution's groups={conv.groups}")
        if options.get("merge_weights") and conv.groups > 1:
            raise ValueError(f"merge_weights=True is not possible with groups={conv.groups}")
        ones = (1,) * len(conv.kernel_size)
        shapes = (r, conv.in_channels, *conv.kernel_size), (conv.out_channels, r // conv.groups, *ones)
        bias = None if conv.bias is None else conv.bias.detach()
        self = cls.__new__(cls)
        self._register(conv.weight.detach(), bias, shapes, r, lora_alpha, lora_dropout, **options)
        for name in _SETTINGS:
            setattr(self, name, getattr(conv, name))
        return self.train(conv.training)

    def reset_lora_parameters(self) -> None:
        """A from kaiming_uniform(a=√5) and B zero."""
        if self.lora_A is not None and self.lora_B is not None:
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
            nn.init.zeros_(self.lora_B)

    @property
    def dims(self) -> int:
        """The number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in, *size) -> (..., out, *size'), with one dimension in place of ... or none."""
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != self.in_channels:
            sizes = ", *" * self.dims
            raise ValueError(f"x must be (N, {self.in_channels}{sizes}) or without N, got shape {tuple(x.shape)}")
        if self.lora_A is None or self.lora_B is None or not self._adapts():
            return self._conv(x, self.weight, self.bias, self.groups)
        dropout_p = self.lora_dropout if self.training else 0.0
        if is_linear(self):
            return convolve_windows(
                self, x, self.lora_A, self.lora_B, scaling=self.scaling, dropout_p=dropout_p, backend=self.backend
            )
        validation.check_frozen(self.weight)
        base = self._conv(x, self.weight, self.bias, self.groups)
        S = self._conv(F.dropout(x.to(self.lora_A.dtype), dropout_p), self.lora_A)
        lora_B, scaling = changing(self.lora_B, self.scaling)
        update = _FUNCTIONS[self.dims - 1](S, lora_B, groups=self.groups)
        return torch.add(base, update, alpha=scaling).to(base.dtype)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """A convolution with this one's stride, padding and dilation."""
        convolve = _FUNCTIONS[self.dims - 1]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    @property
    def is_dilated(self) -> bool:
        """Whether the dilation makes a difference."""
        return any(k > 1 and d > 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def unmergeable_reason(self) -> str | None:
        """That of a grouped convolution."""
        if self.groups == 1 or not self.r:
            return None
        return f"with groups={self.groups} the update reads all channels, and the weight those of its group only"

    def delta_weight(self) -> Tensor:
        """scaling · B A, (out, in, *kernel), in float32 (float64 for float64 factors).  Raises RuntimeError with groups."""
        if reason := self.unmergeable_reason():
            raise RuntimeError(f"there is no delta_weight: {reason}")
        if self.lora_A is None or self.lora_B is None:
            return torch.zeros_like(self.weight, dtype=torch.float32)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        return (B.flatten(1) @ A.flatten(1)).view(self.weight.shape) * self.scaling

    def plain_module(self) -> nn.Module:
        """An nn.Conv1d, nn.Conv2d or nn.Conv3d on the meta device."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return _TYPES[self.dims - 1](**settings, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """What nn.Module prints between the parentheses."""
        settings = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding, "groups": self.groups}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        return f"{self.in_channels}, {self.out_channels}, {text}, bias={self.bias is not None}, {super().extra_repr()}"


def _padding(conv: Any) -> tuple[int, ...]:
    """The padding of each dimension, both sides together where it is "same"."""
    if isinstance(conv.padding, tuple):
        return conv.padding
    same = conv.padding == "same"
    return tuple(same * d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))


def is_linear(conv: Any) -> bool:
    """Whether a convolution is a linear on a view of x: its windows neither overlap nor have gaps, and nothing is padded."""
    sizes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return conv.groups == 1 and not any(_padding(conv)) and all(k == 1 or (k == s and d == 1) for k, s, d in sizes)


def windows(conv: Any, x: Tensor) -> Tensor:
    """x (..., in, *size) as (..., *size', in · kernel): a row is what one position of y sees.  A copy unless pointwise."""
    dims = len(conv.kernel_size)
    first = x.dim() - dims
    for i in reversed(range(dims)):
        k, s, n = conv.kernel_size[i], conv.stride[i], x.shape[first + i]
        if n < k:
            raise ValueError(f"x has shape {tuple(x.shape)}: dimension {first + i} is smaller than the kernel's {k}")
        if k == 1:
            x = x[(slice(None),) * (first + i) + (slice(None, None, s),)].unsqueeze(first + i + 1)
        else:
            x = (x if n % k == 0 else x.narrow(first + i, 0, n // k * k)).unflatten(first + i, (n // k, k))
    spatial, kernel = range(first, x.dim(), 2), range(first + 1, x.dim(), 2)
    return x.permute(*range(first - 1), *spatial, first - 1, *kernel).flatten(-dims - 1)


def convolve_windows(conv: Any, x: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
    """y of a convolution that `is_linear`, with its weight and bias, by `lora_linear`, which takes the options.

    Of a contiguous x it is contiguous, as of torch's convolutions; else its channels lie next to each other.
    """
    weight, A, B = (tensor.flatten(1) for tensor in (conv.weight, A, B))
    y = lora_linear(windows(conv, x), weight, A, B, conv.bias, **options).movedim(-1, -len(conv.kernel_size) - 1)
    return y.contiguous() if x.is_contiguous() else y
