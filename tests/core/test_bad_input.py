"""Bad input is refused: the message names the argument, its value and what was expected. Nothing was launched or changed."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from fastlora import FusedLoraLinear, backends, dropout_mask, lora_linear, ops, reference

M, K, N, R = 6, 8, 10, 3


@pytest.fixture
def nothing_runs(monkeypatch):
    """No operator runs."""

    def run(direction, backend):
        raise AssertionError("an operator ran on input that should have been refused")

    monkeypatch.setattr(ops, "_implementation", run)


def arguments(**changes):
    tensors = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {name: torch.randn(shape) for name, shape in tensors.items()} | changes


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantised tensors; people still have them
        return torch.quantize_per_tensor(torch.randn(N, K), 0.1, 0, torch.qint8)


X, W = torch.randn(M, K), torch.randn(N, K)
A, B = torch.randn(R, K), torch.randn(N, R)
REFUSED = {
    "x of another width": ({"x": torch.randn(M, K + 1)}, ValueError, r"x has shape \(6, 9\).*last dimension to be 8"),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\).*last dimension to be 8"),
    "x an integer": ({"x": X.long()}, TypeError, "x must be float32.*got torch.int64"),
    "x complex": ({"x": X.cfloat()}, TypeError, "x must be float32.*got torch.complex64"),
    "x no tensor": ({"x": [[1.0] * K]}, TypeError, "x must be a torch.Tensor, got list"),
    "x on another device": ({"x": X.to("meta")}, ValueError, "weight is on cpu, but x is on meta"),
    "x of another dtype": ({"x": X.half()}, TypeError, "weight is torch.float32 but x is torch.float16"),
    "weight 1-D": ({"weight": W[0]}, ValueError, r"weight must have 2 dimension\(s\), got shape \(8,\)"),
    "weight no tensor": ({"weight": W.tolist()}, TypeError, "weight must be a torch.Tensor, got list"),
    "weight sparse": ({"weight": W.to_sparse()}, TypeError, r"weight must be a dense \(strided\) tensor, got.*sparse_coo"),
    "weight quantised": ({"weight": quantised()}, TypeError, "weight must be float32.*got torch.qint8; dequantise it first"),
    "weight packed": ({"weight": W.byte()}, TypeError, "weight.*got torch.uint8; dequantise it first"),
    "weight complex": ({"weight": W.cfloat()}, TypeError, "weight must be float32.*got torch.complex64$"),
    "weight requires grad": (
        {"weight": W.clone().requires_grad_()},
        ValueError,
        r"grad.*call weight.requires_grad_\(False\), or",
    ),
    "A of another width": ({"lora_A": torch.randn(R, K + 1)}, ValueError, r"lora_A must be \(r, in\) with in=8, got \(3, 9\)"),
    "ranks differ": ({"lora_B": torch.randn(N, R + 1)}, ValueError, r"lora_B must be \(out, r\) = \(10, 3\), got \(10, 4\)"),
    "A and B of two dtypes": ({"lora_A": A.half()}, TypeError, "lora_A is torch.float16 but lora_B is torch.float32"),
    "half adapters on a float32 base": (
        {"lora_A": A.half(), "lora_B": B.half()},
        TypeError,
        "must have x's dtype, or be float32",
    ),
    "A on another device": ({"lora_A": A.to("meta")}, ValueError, "lora_A is on meta, but x is on cpu"),
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
    "seed of 32 bits": ({"seed": torch.tensor([1]).int()}, TypeError, "seed must be an int64 tensor, got.*int32"),
    "seed of two elements": ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have one element, got shape \(2,\)"),
    "seed on another device": ({"seed": torch.tensor([1]).to("meta")}, ValueError, "seed is on meta, expected x's device cpu"),
    "float64 for Triton": (
        {name: tensor.double() for name, tensor in arguments().items()} | {"backend": "triton"},
        TypeError,
        'backend="triton" computes in float32, float16 or bfloat16, got x in float64',
    ),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be None.*, got 'cuda'"),
}


def test_triton_without_a_driver(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match=r'"triton" cannot run tensors on cpu: it needs.*TRITON_INTERPRET=1'):
        lora_linear(**arguments(), backend="triton")


def test_a_gpu_below_capability_80_takes_torch(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backends.available_backends(gpu) == ("torch",)
    assert backends.choose_backend(None, gpu, torch.float16) == "torch"
    with pytest.raises(RuntimeError, match=r'backend="fused" cannot run tensors on cuda:0: it needs .* capability 8\.0'):
        backends.choose_backend("fused", gpu, torch.float16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gfx942:sramecc+:xnack-", backends.BACKENDS[::-1]), ("gfx1100", ("torch",)), ("gfx90a", ("torch",))],
)
def test_an_amd_gpu_takes_triton_on_request_alone(monkeypatch, name, expected):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert backends.available_backends(gpu) == expected
    assert backends.choose_backend(None, gpu, torch.float16) == "torch"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_triton_torch_takes_over_and_says_so(monkeypatch, device):
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    monkeypatch.setattr(backends, "INTERPRETING", True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(RuntimeWarning, match=r"Triton is not installed.*plain torch operations"):
        assert backends.available_backends(device) == ("torch",)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=r'"fused" cannot run tensors on .*: Triton is not'):
        backends.choose_backend("fused", torch.device(device), torch.float16)


def test_mixed_dtypes_are_judged_after_autocast():
    """Under autocast a float32 weight and a bfloat16 x are cast alike; float64 is not, so it stays a mismatch."""
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"x is torch.float64"):
        lora_linear(**arguments(x=torch.randn(M, K, dtype=torch.float64)))


TRANSFORMS = {
    "grad": lambda call, A: torch.func.grad(lambda a: call(a).sum())(A),
    "vmap": lambda call, A: torch.func.vmap(call)(A.unsqueeze(0)),
    "jvp": lambda call, A: torch.func.jvp(call, (A,), (A,)),
    "jacrev": lambda call, A: torch.func.jacrev(call)(A),
    # makes the frozen weight require grad too, which is not the user's mistake
    "grad of all": lambda call, A: torch.func.grad(lambda tensors: lora_linear(**tensors).sum())(arguments()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_transforms(transform):
    fixed = arguments()
    A = fixed.pop("lora_A")
    with pytest.raises(RuntimeError, match="lora_linear does not support functorch transforms"):
        TRANSFORMS[transform](lambda a: lora_linear(lora_A=a, **fixed), A)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "bias"])
def test_second_derivative(name):
    """Also where dy does not require grad, which once_differentiable lets pass as a zero."""
    tensors = arguments()
    for leaf, tensor in tensors.items():
        tensor.requires_grad_(leaf != "weight")
    y = lora_linear(**tensors)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        torch.autograd.grad(y.sum(), tensors[name], create_graph=True)


def test_rank_above_both_sizes_warns_and_runs():
    rank = min(K, N) + 1
    tensors = arguments(lora_A=torch.randn(rank, K), lora_B=torch.randn(N, rank))
    with pytest.warns(UserWarning, match="r=9 is above min.in_features=8, out_features=10"):
        y = lora_linear(**tensors)
    assert y.shape == (M, N)
    with pytest.warns(UserWarning, match="r=9 is above min"):
        layer = FusedLoraLinear(K, N, r=rank)
    assert layer.lora_A.shape == (rank, K)


MODULE = {
    "r negative": ({"r": -1}, ValueError, "r must be >= 0, got -1"),
    "r a float": ({"r": 8.0}, TypeError, "r must be an int, got float 8.0"),
    "in_features negative": ({"in_features": -8}, ValueError, "in_features must be >= 0, got -8"),
    "dropout above 1": ({"lora_dropout": 1.1}, ValueError, r"lora_dropout must be in \[0, 1\], got 1.1"),
    "alpha beyond a float": ({"lora_alpha": 10**400}, ValueError, "lora_alpha must be finite, got 1000"),
    "half adapters on a float32 base": ({"adapter_dtype": torch.float16}, TypeError, "adapters must have weight's dtype"),
    "an integer dtype": ({"dtype": torch.int8}, TypeError, "dtype must be float32.*got torch.int8"),
    "the name of a dtype": ({"adapter_dtype": "float32"}, TypeError, "adapter_dtype must be float32.*got 'float32'"),
    "PEFT's bias": ({"bias": "none"}, TypeError, "bias must be a bool, got str 'none'"),
    "a scaling rule": ({"use_rslora": "alpha"}, TypeError, "use_rslora must be a bool, got str 'alpha'"),
}


packed, hooked, patched, biased = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(K, N), Conv1D(N, K)
packed.weight = nn.Parameter(W.byte(), requires_grad=False)
hooked.register_forward_hook(lambda *arguments: None)
patched.forward = lambda x: x
biased.bias = nn.Parameter(torch.randn(K))
CONV1D = {"fan_in_fan_out": True}
LINEAR = {
    "a ReLU": ({"linear": nn.ReLU()}, TypeError, "linear must be an nn.Linear with fan_in_fan_out=False, got ReLU"),
    "a convolution": ({"linear": nn.Conv2d(3, 8, 3)}, TypeError, "linear must be an nn.Linear.*got Conv2d"),
    "an embedding": ({"linear": nn.Embedding(K, N)} | CONV1D, TypeError, "a module with a bias.*got Embedding"),
    "a LoRA linear": ({"linear": FusedLoraLinear(K, N)}, TypeError, "linear must be an nn.Linear.*got FusedLoraLinear"),
    "a Conv1D taken for a linear": ({"linear": Conv1D(N, K)}, TypeError, "linear must be an nn.Linear.*got Conv1D"),
    "a linear taken for a Conv1D": ({"linear": nn.Linear(K, N)} | CONV1D, TypeError, "unlike an nn.Linear's"),
    "packed": ({"linear": packed}, TypeError, "weight must be float32.*got torch.uint8; dequantise it first"),
    "parametrised": ({"linear": weight_norm(nn.Linear(K, N))}, TypeError, "remove the parametrisation"),
    "hooked": ({"linear": hooked}, ValueError, "linear is a Linear with hooks"),
    "with a forward of its own": ({"linear": patched}, ValueError, "linear is a Linear with hooks or a forward of its own"),
    "a bias of another length": ({"linear": biased} | CONV1D, ValueError, r"bias must be .* = \(10,\), got \(8,\)"),
}
MASK = {
    "p above 1": ({"p": 2.0}, ValueError, r"p must be in \[0, 1\], got 2.0"),
    "rows negative": ({"rows": -1}, ValueError, "rows must be >= 0, got -1"),
    "cols a float": ({"cols": 1.5}, TypeError, "cols must be an int, got float 1.5"),
    "seed a string": ({"seed": "7"}, TypeError, "seed must be None, an int or an int64 tensor of one element, got str '7'"),
    "seed of two elements": ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must have one element"),
}
CALLS = {
    "lora_linear": (lambda **changes: lora_linear(**arguments(**changes)), REFUSED),
    "module": (lambda **changes: FusedLoraLinear(**{"in_features": K, "out_features": N, "r": R} | changes), MODULE),
    "from_linear": (lambda **changes: FusedLoraLinear.from_linear(**{"r": R} | changes), LINEAR),
    "dropout_mask": (lambda **changes: dropout_mask(**{"seed": 1, "rows": 2, "cols": 3, "p": 0.5} | changes), MASK),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("call", "name"), [(call, name) for call, (_, table) in CALLS.items() for name in table])
def test_refused(call, name):
    run, table = CALLS[call]
    changes, error, message = table[name]
    with pytest.raises(error, match=message):
        run(**changes)


@pytest.mark.parametrize("keep_mask", [None, torch.ones(M, K + 1, dtype=torch.bool)])
def test_reference_wants_its_mask(keep_mask):
    with pytest.raises(ValueError, match=r"keep_mask must be a bool tensor of shape \(6, 8\) when dropout_p=0.5"):
        reference.lora_linear(**arguments(), dropout_p=0.5, keep_mask=keep_mask)
