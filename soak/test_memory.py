"""Ten thousand training steps hold no more memory than the first thousand; a thousand merges leave the weight bit for bit."""

import gc
import sys

import peft
import psutil
import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("torch_backend")
BYTES_PER_STEP = 100  # of growth that fails: less than the smallest tensor takes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def injected() -> nn.Module:
    return fastlora.inject(network(), target_modules=["0", "2"], r=4, lora_dropout=0.1)


def accelerated() -> nn.Module:
    model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=0.1))
    fastlora.accelerate(model)
    return model


def held() -> tuple[int, int, int]:
    """Live tensors, blocks of Python's allocator, resident bytes."""
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return tensors, sys.getallocatedblocks(), psutil.Process().memory_info().rss


@pytest.mark.parametrize("build", [injected, accelerated])
def test_training_steps_hold_no_memory(build, counted) -> None:
    model = build()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    x, target = torch.randn(32, 16), torch.randn(32, 8)
    first, before, warm = None, None, 0
    for step in counted(10_000):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if first is None else first
        if step in (10, 1000):
            before, warm = held(), step
    assert before is not None
    after = held()
    tensors, blocks, resident = (now - then for now, then in zip(after, before, strict=True))
    steps = step - warm
    print(f"loss {first:.3f} to {loss.item():.3f}; {tensors} tensors, {blocks} blocks, {resident} bytes more", end="")
    assert loss.item() < first
    assert tensors <= 0
    assert blocks < max(steps // 10, 1000)
    assert resident < max(BYTES_PER_STEP * steps, 4 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merging_and_unmerging(dtype: torch.dtype, fan_in_fan_out: bool, counted) -> None:
    torch.manual_seed(0)
    layer = FusedLoraLinear(33, 17, r=5, lora_alpha=7, dtype=dtype)
    if fan_in_fan_out:
        layer = FusedLoraLinear.from_linear(_Transposed(layer.weight), r=5, lora_alpha=7, fan_in_fan_out=True)
    base, bits = layer.weight.detach().clone(), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for _ in counted(1_000):
        with torch.no_grad():
            layer.lora_A.normal_()
            layer.lora_B.normal_()
        layer.merge()
        wide = torch.promote_types(dtype, torch.float32)
        delta = layer.scaling * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))
        expected = (base.to(wide) + (delta.t() if fan_in_fan_out else delta)).to(dtype)
        assert torch.allclose(layer.weight, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        assert not torch.equal(layer.weight, base)
        layer.unmerge()
        assert torch.equal(layer.weight.view(bits), base.view(bits))


class _Transposed(nn.Module):
    """A layer with its weight as (in, out), as transformers' Conv1D has it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().t().contiguous()), None
