"""GPTQModel's linears in the two layouts of published checkpoints, GPTQ and AWQ (GEMM).

With codes q (in, out), a scale and a zero for each output and group of inputs, and g(k) the group of input k:

    W[n, k] = (q[k, n] − qzeros[g(k), n]) · scales[g(k), n]

An int32 holds 32 / bits codes.  In GPTQ's qweight they are neighbours along `in`, in its qzeros along `out`; in AWQ's they are
neighbours along `out` in both, the even ones before the odd ones.  Kernels that lay the weight out anew are not read.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.quantized.codes import affine, unpack
from fastlora.quantized.weight import Family, QuantizedWeight, Scheme, is_layer

PACKAGE = "gptqmodel.nn_modules.qlinear"
GPTQ = (f"{PACKAGE}.torch:TorchLinear", f"{PACKAGE}.tritonv2:TritonV2Linear")
AWQ = (
    f"{PACKAGE}.torch_awq:AwqTorchLinear",
    f"{PACKAGE}.gemm_awq:AwqGEMMLinear",
    f"{PACKAGE}.gemm_awq_triton:AwqGEMMTritonLinear",
)
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def read(linear: Any) -> QuantizedWeight | str | None:
    """See `Family`.  Statistics: (scales, qzeros), and with desc_act the group of each input."""
    kind = "gptq" if is_layer(linear, *GPTQ) else "awq" if is_layer(linear, *AWQ) else None
    if kind is None:
        return None
    bits, packed = linear.bits, linear.qweight
    if bits not in ((2, 4, 8) if kind == "gptq" else (4,)) or packed.dtype != torch.int32:
        return f"packs {bits} bits into {packed.dtype}"
    if linear.adapter is not None or linear.online_full_had or linear.online_partial_had:
        return "rotates its input, or has an adapter of its own"
    groups = (linear.g_idx,) if kind == "gptq" and linear.desc_act else ()
    group = linear.group_size if linear.group_size > 0 else linear.in_features
    scheme = Scheme(kind, (linear.out_features, linear.in_features), (bits, group))
    return QuantizedWeight(packed, (linear.scales, linear.qzeros, *groups), scheme)


def _dense(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    (scales, qzeros, *groups), (bits, group), (N, K) = weight.statistics, weight.scheme.options, weight.shape
    dim, shifts = (1, AWQ_SHIFTS) if weight.scheme.kind == "awq" else (0, range(0, 32, bits))
    codes = torch.stack(unpack(weight.packed, bits, shifts), dim + 1).flatten(dim, dim + 1)
    zeros = torch.stack(unpack(qzeros, bits, shifts), 2).flatten(1, 2)
    if groups:
        group, (index,) = 1, groups
        scales, zeros = scales[index], zeros[index]
    # The last words of GPTQ's may hold codes too many.
    return affine(codes[:K].t(), scales.t(), zeros[:, :N].t(), (1, group), dtype)


FAMILY = Family(read, {"gptq": _dense, "awq": _dense})
