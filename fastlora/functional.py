"""`lora_linear` checks its inputs, follows autocast, chooses the backend, draws the seed and applies the Function.

`dropout_mask` is the mask that it takes for a seed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import ops, validation
from fastlora.autograd import LoraLinearFunction
from fastlora.boundary import cast, changing, settle, unpack
from fastlora.dropout import keep_mask
from fastlora.quantized import QuantizedWeight


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, with gradients for x, A, B and bias.  W is frozen.

    drop(x) zeroes each element of x with probability dropout_p and scales the others by the inverse of the realised keep rate.
    `fastlora.dropout_mask(seed, M, in, dropout_p)` is the mask.  Products are summed in float32.  A 16-bit result is rounded
    once by "fused"; "addmm" and "torch" round the first term once more when they add the second, as eager torch does.

    Args:
        x: (..., in), any strides.
        weight: (out, in), must not require grad; or a `fastlora.quantized.QuantizedWeight`, which is made dense in x's dtype
            for each product and saved packed.
        lora_A: (r, in).  lora_B: (out, r).
        bias: (out,) or None; may require grad.  With a quantised weight it may have any floating dtype and is cast to x's, as
            bitsandbytes does.
        scaling: alpha / r, or alpha / √r with rsLoRA.
        dropout_p: drop probability in [0, 1], realised in steps of 1/32768.
        training: False turns dropout off, whatever dropout_p and seed are.
        seed: the mask's seed: an int, or an int64 tensor of one element on x.device, which must keep its value until backward.
            None draws one from torch's default generator of x.device.
        backend: None takes "triton" on an NVIDIA GPU of capability 8.0 or newer unless x is float64, otherwise "torch".
            "triton" runs the form that suits the shape (`fastlora.dispatch`).  "fused" and "addmm" insist on one;
            "fused/128,256,64,32,8,3,8" also names the GEMM's tile, where the operands can use it.

    Dtypes: x, weight and bias share one of float32, float16, bfloat16, float64.  lora_A and lora_B share that dtype too, or are
    float32 while x is 16-bit.  Under autocast all are cast first, as F.linear would.  float32 products use TF32 on the tensor
    cores where torch's own switch (`torch.backends.cuda.matmul`) allows it.

    Returns:
        (..., out) in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, layout, shape, device or range.
        RuntimeError: a backend that cannot run these tensors, a functorch transform, or a second derivative.
    """
    validation.check_tensor(x, "x")
    autocast = validation.autocast_dtype(x.device)
    validation.check_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, autocast)
    backend, (dropout_p,), seed = settle("lora_linear", x, (dropout_p,), training, seed, backend, autocast)
    dense, scheme, statistics = unpack(weight, autocast)
    x, lora_A, lora_B = cast(x, autocast), cast(lora_A, autocast), cast(lora_B, autocast)
    bias = None if bias is None else bias.to(x.dtype)
    lora_B, scaling = changing(lora_B, scaling)
    if lora_A.shape[0] == 0 and scheme is None:
        return F.linear(x, dense, bias)
    arguments = x, dense, lora_A, lora_B, bias, seed, float(scaling), dropout_p, backend
    if scheme is not None or torch.is_grad_enabled():
        return LoraLinearFunction.apply(*arguments, scheme, *statistics)
    return ops.LORA_LINEAR(*arguments)[0]  # a fifth of the host's time less, which is what decoding waits for


def dropout_mask(
    seed: int | Tensor, rows: int, cols: int, p: float, *, projection: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The keep mask of a (rows, cols) activation, True = kept, bit for bit the one that the kernels use.

    Args:
        seed: an int in [-2**63, 2**63), or an int64 tensor of one element.
        rows, cols: the shape of x viewed as (M, in).
        p: drop probability in [0, 1]; the realised rate is round(p * 32768) / 32768.
        projection: which of the masks of this seed, at least 0 and below 2**32; a single linear takes mask 0.
        device: where the mask is made; default: the seed's device for a tensor, torch's default device for an int.

    Returns:
        bool (rows, cols).

    Raises:
        TypeError: seed is neither an int nor an int64 tensor.
        ValueError: p outside [0, 1], a negative size, a projection or a seed that does not fit.
    """
    validation.check_dropout_p(p, "p")
    validation.check_size(rows, "rows")
    validation.check_size(cols, "cols")
    validation.check_size(projection, "projection")
    if projection >= 1 << 32:
        raise ValueError(f"projection must be below 2**32, got {projection}")
    validation.check_seed(seed)
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    return keep_mask(seed.to(device=device).reshape(1), rows, cols, p, projection)
