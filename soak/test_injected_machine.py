"""Any sequence of what one does with an injected model, against a model that eager PyTorch computes.

After every step the two have the same state bit for bit, the same trainable parameters, mode and merged layers; a merged one
computes the same bits, another one is as accurate as the eager one.
"""

import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from peft_models import MaskedDropout
from torch import Tensor, nn

from fastlora import FusedLoraLinear, from_pretrained, inject, load_adapter, reference, save_adapter, unload
from soak.networks import DTYPES, SIZE, Network, assert_accurate, assert_equal, run
from soak.pair import Pair, seeds
from soak.scale import scaled


class Eager(nn.Module):
    """What a FusedLoraLinear is to compute; `merged` is the merged weight, or None."""

    def __init__(self, layer: FusedLoraLinear) -> None:
        super().__init__()
        for name in ("weight", "bias", "lora_A", "lora_B"):
            held = getattr(layer, name)
            setattr(self, name, nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad))
        self.scaling, self.dropout = layer.lora_alpha / layer.r, MaskedDropout(layer.lora_dropout)
        self.register_buffer("merged", None, persistent=False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        dropout = self.dropout if self.dropout.p and self.training else None
        return reference.lora_linear(x, self.weight, self.lora_A, self.lora_B, self.bias, scaling=self.scaling, dropout=dropout)

    def merge(self) -> None:
        A, B = self.lora_A.detach().float(), self.lora_B.detach().float()
        self.merged = (self.weight.float() + self.scaling * (B @ A)).to(self.weight.dtype)


class Machine(Pair):
    steps = 0

    @initialize(
        base=st.sampled_from(DTYPES),
        wide=st.booleans(),
        bias=st.sampled_from(["none", "lora_only"]),
        p=st.sampled_from([0.0, 0.3]),
    )
    def inject(self, base: torch.dtype, wide: bool, bias: str, p: float) -> None:
        self.options: dict[str, Any] = {"target_modules": ["first", "second"], "modules_to_save": ["head"], "bias": bias}
        self.options |= {"r": SIZE, "lora_alpha": 12, "lora_dropout": p}
        self.ours = inject(Network().to(base), **self.options, adapter_dtype=torch.float32 if wide else None)
        self.eager = copy.deepcopy(self.ours)
        for name in ("first", "second"):
            setattr(self.eager, name, Eager(getattr(self.ours, name)))
        self.change(1)

    def layers(self, model: nn.Module) -> list[Any]:
        return [model.first, model.second]

    @property
    def merged(self) -> bool:
        return self.eager.first.merged is not None

    @rule()
    def merge(self) -> None:
        if self.merged:
            with pytest.raises(RuntimeError, match="merged already"):
                self.ours.first.merge()
        else:
            for model in (self.ours, self.eager):
                for layer in self.layers(model):
                    layer.merge()
            for ours, eager in zip(self.layers(self.ours), self.layers(self.eager), strict=True):
                assert torch.allclose(ours.weight, eager.merged, rtol=torch.finfo(ours.weight.dtype).eps, atol=1e-6)
                eager.merged.copy_(ours.weight)  # the sum may round the other way

    @rule()
    def unmerge(self) -> None:
        for layer in self.layers(self.ours):
            if self.merged:
                layer.unmerge()
            else:
                with pytest.raises(RuntimeError, match="not merged"):
                    layer.unmerge()
        for layer in self.layers(self.eager):
            layer.merged = None

    @rule(seed=seeds)
    def state_dict(self, seed: int) -> None:
        """Saved, changed, loaded: as it was.  A merged model is merged again, with its adapters of now."""
        saved = copy.deepcopy(self.ours.state_dict())
        self.forget()
        self.ours.load_state_dict(saved)
        for ours, eager in zip(self.layers(self.ours), self.layers(self.eager), strict=True):
            if self.merged:
                eager.merge()
                eager.merged.copy_(ours.weight)

    @rule(anew=st.booleans(), trainable=st.booleans())
    def save_and_load(self, anew: bool, trainable: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.ours, folder)
            if anew:
                wide = self.ours.first.lora_A.dtype
                plain = unload(copy.deepcopy(self.ours))
                self.ours = from_pretrained(plain, folder, is_trainable=trainable, adapter_dtype=wide)
                for layer in self.layers(self.eager):
                    layer.merged = None
                trained = [layer.bias for layer in self.layers(self.eager)] if self.options["bias"] == "lora_only" else []
                trained += [p for n, p in self.eager.named_parameters() if "lora_" in n or "head" in n]
                self.eager.requires_grad_(False)
                [p.requires_grad_(trainable) for p in trained]
                self.eager.train(trainable and self.ours.training)
            elif self.merged:
                with pytest.raises(RuntimeError, match="is merged"):
                    load_adapter(self.ours, folder)
            else:
                with torch.no_grad():
                    self.ours.first.lora_A.zero_()
                    self.ours.head.weight.zero_()
                load_adapter(self.ours, folder)

    @precondition(lambda self: not self.merged and self.eager.first.lora_A.requires_grad)
    @rule(seed=seeds)
    def train_step(self, seed: int) -> None:
        truth = run(copy.deepcopy(self.eager).double(), seed, grads=True)
        ours = run(self.ours, seed, grads=True)
        assert_accurate(ours, run(self.eager, seed, grads=True), truth)
        self.apply(ours)

    @invariant()
    def holds(self) -> None:
        Machine.steps += 1
        self.assert_computes(self.ours, Machine.steps % 7)
        self.assert_same_state()
        assert [layer.merged for layer in self.layers(self.ours)] == [self.merged] * 2
        assert {module.training for module in self.ours.modules()} == {self.eager.training}

    def assert_computes(self, model: nn.Module, seed: int) -> None:
        ours, eager = (run(each, seed, grads=False) for each in (model, self.eager))
        if self.merged:
            assert_equal(ours, eager)
        else:
            assert_accurate(ours, eager, run(copy.deepcopy(self.eager).double(), seed, grads=False))


@pytest.mark.usefixtures("torch_backend")
def test_any_sequence() -> None:
    warnings.simplefilter("ignore")
    Machine.steps = 0
    run_state_machine_as_test(Machine, settings=settings(max_examples=scaled(100), stateful_step_count=40))
    print(f"\ninjected model: {Machine.steps:,} steps in {scaled(100)} sequences", end="")
