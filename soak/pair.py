"""A model of ours and an eager one that go through the same steps: the rules that both state machines share."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import nn

from soak.networks import DTYPES, SIZE, assert_equal

seeds = st.integers(0, 99)


class Pair(RuleBasedStateMachine):
    ours: Any
    eager: Any

    def both(self, change: Callable[[Any], Any]) -> None:
        change(self.ours), change(self.eager)

    def assert_computes(self, model: nn.Module, seed: int) -> Any:
        """`model`, a form of ours, computes what the eager one does."""
        raise NotImplementedError

    @rule(seed=seeds)
    def change(self, seed: int) -> None:
        """Other values for all adapters; a merged weight keeps the old ones."""

        @torch.no_grad()
        def draw(model: nn.Module) -> None:
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / SIZE**0.5)

        self.both(draw)

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.both(lambda model: model.train(mode))

    @rule(dtype=st.sampled_from(DTYPES))
    def to(self, dtype: torch.dtype) -> None:
        self.both(lambda model: model.half() if dtype == torch.float16 else model.to(dtype))

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copied(self, how: str) -> None:
        if how == "deepcopy":
            self.ours = copy.deepcopy(self.ours)
        elif how == "pickle":
            self.ours = pickle.loads(pickle.dumps(self.ours))
        else:
            stream = io.BytesIO()
            torch.save(self.ours, stream)
            stream.seek(0)
            self.ours = torch.load(stream, weights_only=False)

    @rule(seed=seeds)
    def compiled(self, seed: int) -> None:
        torch._dynamo.reset()
        self.assert_computes(torch.compile(self.ours, backend="eager"), seed)

    def assert_same_state(self) -> None:
        """Equal parameters and buffers, and the same of them trained."""
        assert_equal(self.ours.state_dict(), self.eager.state_dict())
        ours, eager = (dict(model.named_parameters()) for model in (self.ours, self.eager))
        assert {n: p.requires_grad for n, p in ours.items()} == {n: p.requires_grad for n, p in eager.items()}

    def apply(self, grads: dict[str, torch.Tensor]) -> None:
        """A step of gradient descent, with the same gradients on both."""

        @torch.no_grad()
        def step(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if name in grads:
                    parameter.sub_(grads[name] * 0.01)

        self.both(step)

    def forget(self) -> None:
        """Other values in all parameters of ours."""
        with torch.no_grad():
            for parameter in self.ours.parameters():
                parameter.normal_()
