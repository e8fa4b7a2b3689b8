"""The activations of a gated MLP and their derivatives, in float32.

act(e) = e · q(e), where q rises from 0 to 1, so that act' = q + e q':

    silu                 q = σ(e)
    gelu_pytorch_tanh    q = σ(2k (e + 0.044715 e³)) = (1 + tanh(k (e + 0.044715 e³))) / 2,  k = √(2/π)
    gelu                 q = Φ(e) = (1 + erf(e / √2)) / 2
"""

import triton
import triton.language as tl

_LINEAR = tl.constexpr(1.5957691216057308)  # 2k
_CUBIC = tl.constexpr(0.07135481627160025)  # 2k · 0.044715
_NORMAL = tl.constexpr(0.3989422804014327)  # 1 / √(2π)
# Φ(−|e|) = t P(t) exp(−e² / 2) / 2 with t = 1 / (1 + _P |e|), to 8e-8: Abramowitz and Stegun, 7.1.26.
_P = tl.constexpr(0.3275911 / 2**0.5)
_P1, _P2, _P3, _P4, _P5 = map(tl.constexpr, (0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145))


@triton.jit
def activation_parts(e, ACTIVATION: tl.constexpr):
    """(q, e q') of float32 e."""
    if ACTIVATION == "gelu":
        bell = tl.exp(e * e * -0.5)  # which erf would compute a second time
        t = 1.0 / (tl.abs(e) * _P + 1.0)
        tail = t * (t * (t * (t * (t * _P5 + _P4) + _P3) + _P2) + _P1) * bell
        return tl.where(e > 0, 1.0 - tail, tail), e * bell * _NORMAL
    if ACTIVATION == "silu":
        q = tl.sigmoid(e)
        return q, e * q * (1.0 - q)
    q = tl.sigmoid(e * (e * e * _CUBIC + _LINEAR))
    return q, e * q * (1.0 - q) * (e * e * (_CUBIC * 3.0) + _LINEAR)
