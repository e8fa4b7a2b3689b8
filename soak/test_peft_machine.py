"""Any sequence of what one does with an accelerated PEFT model, against the same model as PEFT made it.

After every step the two have the same state bit for bit, the same adapters, active one, trainable parameters and mode.  A call
is fused exactly if the layers are accelerated, enabled and not merged; then it is as accurate as PEFT's, otherwise it is PEFT's
bit for bit.
"""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from peft_models import counted_calls, with_masked_dropout
from torch import nn

import fastlora
from soak.networks import DTYPES, SIZE, Network, assert_accurate, assert_equal, run
from soak.pair import Pair, seeds
from soak.scale import scaled

NAMES = ("default", "other", "more")  # no names of modules: PEFT would mistake one for the other
LAYERS = 2


class Machine(Pair):
    steps = fused_calls = 0

    @initialize(base=st.sampled_from(DTYPES), p=st.sampled_from([0.0, 0.3]), accelerated=st.booleans())
    def wrap(self, base: torch.dtype, p: float, accelerated: bool) -> None:
        self.adapters, self.active, self.accelerated = ["default"], "default", False
        self.ours = peft.get_peft_model(Network().to(base), self.config(9, p, modules_to_save=["head"]))
        self.eager = copy.deepcopy(self.ours)
        self.change(1)
        if accelerated:
            self.accelerate()

    def config(self, alpha: int, p: float, **options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(target_modules=["first", "second"], r=SIZE, lora_alpha=alpha, lora_dropout=p, **options)

    @rule()
    def accelerate(self) -> None:
        report = fastlora.accelerate(self.ours)
        assert len(report.taken) + len(report.waiting) == LAYERS
        assert len(report.already) == LAYERS * self.accelerated
        self.accelerated = True

    @rule()
    def decelerate(self) -> None:
        assert fastlora.decelerate(self.ours) == LAYERS * self.accelerated
        self.accelerated = False

    @precondition(lambda self: not self.merged)
    @rule()
    def merge(self) -> None:
        self.both(lambda model: model.merge_adapter())
        assert self.merged

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.both(lambda model: model.unmerge_adapter())
        assert not self.merged

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        if enabled:
            self.both(lambda model: model.base_model.enable_adapter_layers())
        else:
            self.both(lambda model: model.base_model.disable_adapter_layers())
        assert self.enabled == enabled

    @precondition(lambda self: len(self.adapters) < len(NAMES))
    @rule(alpha=st.sampled_from([3, 16]), p=st.sampled_from([0.0, 0.3]), seed=seeds)
    def add_adapter(self, alpha: int, p: float, seed: int) -> None:
        name = next(name for name in NAMES if name not in self.adapters)
        self.both(lambda model: model.add_adapter(name, self.config(alpha, p)))
        self.adapters.append(name)
        self.change(seed)

    @precondition(lambda self: not self.merged and len(self.adapters) > 1)
    @rule(at=st.integers(0, 1))
    def delete_adapter(self, at: int) -> None:
        name = [name for name in self.adapters if name != self.active][at % (len(self.adapters) - 1)]
        self.both(lambda model: model.delete_adapter(name))
        self.adapters.remove(name)

    @precondition(lambda self: not self.merged and self.enabled)
    @rule(at=st.integers(0, 2))
    def set_adapter(self, at: int) -> None:
        self.active = self.adapters[at % len(self.adapters)]
        self.both(lambda model: model.set_adapter(self.active))

    @rule()
    def state_dict(self) -> None:
        """Saved, changed, loaded: as it was."""
        saved = copy.deepcopy(self.ours.state_dict())
        self.forget()
        self.ours.load_state_dict(saved)

    @precondition(lambda self: not self.merged and len(self.adapters) < len(NAMES))
    @rule()
    def save_and_load(self) -> None:
        """The active adapter under another name."""
        name = next(name for name in NAMES if name not in self.adapters)
        with tempfile.TemporaryDirectory() as folder:
            for kind, model in (("ours", self.ours), ("eager", self.eager)):
                model.save_pretrained(Path(folder) / kind, selected_adapters=[self.active])
            place = Path() if self.active == "default" else Path(self.active)
            files = [Path(folder) / kind / place / "adapter_model.safetensors" for kind in ("ours", "eager")]
            assert files[0].read_bytes() == files[1].read_bytes()
            self.both(lambda model: model.load_adapter(files[1].parent, name))
        self.adapters.append(name)

    @precondition(lambda self: not self.merged and self.enabled)
    @rule(seed=seeds)
    def train_step(self, seed: int) -> None:
        grads = self.assert_computes(self.ours, seed, grads=True)
        self.apply(grads)

    @invariant()
    def holds(self) -> None:
        Machine.steps += 1
        self.assert_computes(self.ours, Machine.steps % 7)
        self.assert_same_state()
        assert [m.training for m in self.ours.modules()] == [m.training for m in self.eager.modules()]
        assert sorted(self.ours.peft_config) == sorted(self.eager.peft_config) == sorted(self.adapters)
        assert self.ours.active_adapter == self.eager.active_adapter == self.active
        assert [layer.merged for layer in fastlora.peft.layers.find(self.ours).values()] == [self.merged] * LAYERS
        assert len(fastlora.peft.status(self.ours).taken) == LAYERS * self.fused

    @property
    def merged(self) -> bool:
        """Of the eager model: PEFT also unmerges when it adds an adapter, and when it calls a layer with disabled adapters."""
        return self.eager.base_model.model.first.merged

    @property
    def enabled(self) -> bool:
        return not self.eager.base_model.model.first.disable_adapters

    @property
    def fused(self) -> bool:
        return self.accelerated and self.enabled and not self.merged

    def assert_computes(self, model: nn.Module, seed: int, *, grads: bool = False) -> dict[str, torch.Tensor]:
        expected = with_masked_dropout(self.eager) if self.fused else self.eager
        eager = run(expected, seed, grads=grads)
        with counted_calls() as made:
            ours = run(model, seed, grads=grads)
        if model is self.ours:
            assert len(made) == LAYERS * self.fused
            Machine.fused_calls += len(made)
        if self.fused:
            assert_accurate(ours, eager, run(copy.deepcopy(expected).double(), seed, grads=grads))
        else:
            assert_equal(ours, eager)
        return ours


@pytest.mark.usefixtures("torch_backend")
def test_any_sequence_with_peft() -> None:
    warnings.simplefilter("ignore")
    run_state_machine_as_test(Machine, settings=settings(max_examples=scaled(100), stateful_step_count=40))
    print(f"\nPEFT model: {Machine.steps:,} steps in {scaled(100)} sequences, {Machine.fused_calls:,} fused calls", end="")
