"""What is refused: the message names the argument, its value and what was expected, and nothing was launched or changed."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from fastlora import FusedLoraLinear, dropout_mask, functional, lora_linear, ops, reference

M, K, N, R = 6, 8, 10, 3


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, request):
    """Inputs are refused before an operator runs."""
    if "after_forward" in request.keywords:
        return

    def run(backend):
        raise AssertionError("an operator ran on input that should have been refused")

    monkeypatch.setattr(ops, "_steps", run)


def arguments(**changes):
    tensors = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "bias": torch.randn(N),
    }
    return tensors | changes


def sparse():
    return torch.eye(N, K).to_sparse()


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantised tensors; people still have them
        return torch.quantize_per_tensor(torch.randn(N, K), 0.1, 0, torch.qint8)


REFUSED = {
    "x of another width": (
        {"x": torch.randn(M, K + 1)},
        ValueError,
        r"x has shape \(6, 9\).*expects its last dimension to be 8",
    ),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    "x an integer": ({"x": torch.ones(M, K, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
    "x complex": ({"x": torch.ones(M, K, dtype=torch.complex64)}, TypeError, "x must be float32.*got torch.complex64"),
    "x no tensor": ({"x": [[1.0] * K]}, TypeError, "x must be a torch.Tensor, got list"),
    "x on another device": ({"x": torch.empty(M, K, device="meta")}, ValueError, "weight is on cpu, but x is on meta"),
    "x of another dtype": ({"x": torch.randn(M, K).half()}, TypeError, "weight is torch.float32 but x is torch.float16"),
    "weight 1-D": ({"weight": torch.randn(K)}, ValueError, r"weight must have 2 dimension\(s\), got shape \(8,\)"),
    "weight sparse": (
        {"weight": sparse()},
        TypeError,
        r"weight must be a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
    "weight quantised": ({"weight": quantised()}, TypeError, "weight must be float32.*got torch.qint8; dequantise it first"),
    "weight packed": (
        {"weight": torch.ones(N, K, dtype=torch.uint8)},
        TypeError,
        "weight.*got torch.uint8; dequantise it first",
    ),
    "weight complex": (
        {"weight": torch.ones(N, K, dtype=torch.complex64)},
        TypeError,
        "weight must be float32.*got torch.complex64",
    ),
    "weight requires grad": (
        {"weight": torch.randn(N, K, requires_grad=True)},
        ValueError,
        r"weight requires grad.*call weight.requires_grad_\(False\), or pass weight.detach\(\)",
    ),
    "A of another width": ({"lora_A": torch.randn(R, K + 1)}, ValueError, r"lora_A must be \(r, in\) with in=8, got \(3, 9\)"),
    "A and B of different rank": (
        {"lora_B": torch.randn(N, R + 1)},
        ValueError,
        r"lora_B must be \(out, r\) = \(10, 3\), got \(10, 4\)",
    ),
    "A and B of different dtypes": (
        {"lora_A": torch.randn(R, K).half()},
        TypeError,
        "lora_A is torch.float16 but lora_B is torch.float32",
    ),
    "half adapters on a float32 base": (
        {"lora_A": torch.randn(R, K).half(), "lora_B": torch.randn(N, R).half()},
        TypeError,
        "adapters must have x's dtype, or be float32 with x in float16 or bfloat16",
    ),
    "A on another device": ({"lora_A": torch.empty(R, K, device="meta")}, ValueError, "lora_A is on meta, but x is on cpu"),
    "bias of another length": ({"bias": torch.randn(N + 1)}, ValueError, r"bias must be \(out,\) = \(10,\), got \(11,\)"),
    "bias of another dtype": ({"bias": torch.randn(N).double()}, TypeError, "bias is torch.float64 but x is torch.float32"),
    "bias 2-D": ({"bias": torch.randn(1, N)}, ValueError, r"bias must have 1 dimension\(s\)"),
    "p below 0": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
    "p above 1": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "p NaN": ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    "p a string": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float.*got str '0.1'"),
    "p a bool": ({"dropout_p": True}, TypeError, "dropout_p must be a float.*got bool True"),
    "scaling NaN": ({"scaling": math.nan}, ValueError, "scaling must be finite, got nan"),
    "scaling a tensor": ({"scaling": torch.tensor(2.0)}, TypeError, "scaling must be a float, got Tensor"),
    "seed a float": ({"seed": 1.0}, TypeError, "seed must be None, an int or an int64 tensor.*got float 1.0"),
    "seed a bool": ({"seed": True}, TypeError, "seed must be None.*got bool True"),
    "seed of 65 bits": ({"seed": 1 << 63}, ValueError, "seed must fit in 64 signed bits, got 9223372036854775808"),
    "seed of another dtype": (
        {"seed": torch.tensor([1], dtype=torch.int32)},
        TypeError,
        "seed must be an int64 tensor, got.*int32",
    ),
    "seed of two elements": ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have one element, got shape \(2,\)"),
    "seed on another device": (
        {"seed": torch.empty(1, dtype=torch.int64, device="meta")},
        ValueError,
        "seed is on meta, expected x's device cpu",
    ),
    "unknown backend": ({"backend": "cuda"}, ValueError, 'backend must be None, "triton" or "torch", got \'cuda\''),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        lora_linear(**arguments(**changes))


def test_triton_refuses_float64():
    tensors = {name: t.double() for name, t in arguments().items()}
    with pytest.raises(TypeError, match='backend="triton" computes in float32, float16 or bfloat16, got x in float64'):
        lora_linear(**tensors, backend="triton")


def test_triton_without_a_driver(monkeypatch):
    monkeypatch.setattr(functional, "INTERPRETING", False)
    with pytest.raises(
        RuntimeError, match=r'backend="triton" cannot run tensors on cpu: it needs a CUDA GPU.*TRITON_INTERPRET=1'
    ):
        lora_linear(**arguments(), backend="triton")


def test_mixed_dtypes_are_judged_after_autocast():
    """Under autocast a float32 weight and a bfloat16 x are cast alike; float64 is not, so it stays a mismatch."""
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"x is torch.float64"):
        lora_linear(**arguments(x=torch.randn(M, K, dtype=torch.float64)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda call, A: torch.func.grad(lambda a: call(a).sum())(A),
        lambda call, A: torch.func.vmap(call)(A.unsqueeze(0)),
        lambda call, A: torch.func.jvp(call, (A,), (A,)),
        lambda call, A: torch.func.jacrev(call)(A),
    ],
    ids=["grad", "vmap", "jvp", "jacrev"],
)
def test_functorch_transforms(transform):
    fixed = arguments()
    A = fixed.pop("lora_A")
    with pytest.raises(RuntimeError, match="lora_linear does not support functorch transforms"):
        transform(lambda a: lora_linear(lora_A=a, **fixed), A)


@pytest.mark.after_forward
def test_second_derivative():
    """Also where only x, A or B would be differentiated again, which once_differentiable lets pass as a zero."""
    tensors = arguments(lora_A=torch.randn(R, K, requires_grad=True), lora_B=torch.randn(N, R, requires_grad=True))
    y = lora_linear(**tensors)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        torch.autograd.grad(y.sum(), tensors["lora_A"], create_graph=True)


@pytest.mark.after_forward
def test_rank_above_both_sizes_warns_and_runs():
    rank = min(K, N) + 1
    tensors = arguments(lora_A=torch.randn(rank, K), lora_B=torch.randn(N, rank))
    with pytest.warns(UserWarning, match="r=9 is above min.in_features=8, out_features=10"):
        lora_linear(**tensors)
    with pytest.warns(UserWarning, match="r=9 is above min"):
        FusedLoraLinear(K, N, r=rank)


MODULE = {
    "r negative": ({"r": -1}, ValueError, "r must be >= 0, got -1"),
    "r a float": ({"r": 8.0}, TypeError, "r must be an int, got float 8.0"),
    "in_features negative": ({"in_features": -8}, ValueError, "in_features must be >= 0, got -8"),
    "dropout above 1": ({"lora_dropout": 1.1}, ValueError, r"lora_dropout must be in \[0, 1\], got 1.1"),
    "alpha infinite": ({"lora_alpha": math.inf}, ValueError, "lora_alpha must be finite, got inf"),
    "half adapters on a float32 base": ({"adapter_dtype": torch.float16}, TypeError, "adapters must have x's dtype"),
}


@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name):
    changes, error, message = MODULE[name]
    with pytest.raises(error, match=message):
        FusedLoraLinear(**{"in_features": K, "out_features": N, "r": R} | changes)


def test_from_linear_refuses_what_is_no_linear():
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear or have a 2-D weight tensor, got ReLU"):
        FusedLoraLinear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match=re.escape("weight must have 2 dimension(s), got shape (8, 3, 3, 3)")):
        FusedLoraLinear.from_linear(nn.Conv2d(3, 8, 3))
    quantized = nn.Linear(K, N)
    quantized.weight = nn.Parameter(torch.ones(N, K, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight must be float32.*got torch.uint8; dequantise it first"):
        FusedLoraLinear.from_linear(quantized)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p": 2.0}, ValueError, r"p must be in \[0, 1\], got 2.0"),
        ({"p": math.nan}, ValueError, "got nan"),
        ({"rows": -1}, ValueError, "rows must be >= 0, got -1"),
        ({"cols": 1.5}, TypeError, "cols must be an int, got float 1.5"),
        ({"seed": "7"}, TypeError, "seed must be None, an int or an int64 tensor of one element, got str '7'"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must have one element"),
    ],
)
def test_dropout_mask_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        dropout_mask(**{"seed": 1, "rows": 2, "cols": 3, "p": 0.5} | changes)


@pytest.mark.parametrize("keep_mask", [None, torch.ones(M, K + 1, dtype=torch.bool)])
def test_reference_wants_its_mask(keep_mask):
    with pytest.raises(ValueError, match=r"keep_mask must be a bool tensor of shape \(6, 8\) when dropout_p=0.5"):
        reference.lora_linear(**arguments(), dropout_p=0.5, keep_mask=keep_mask)
