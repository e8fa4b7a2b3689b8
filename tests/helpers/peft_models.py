"""Tiny models from transformers, wrapped by PEFT: what they compute, and how the tests of fastlora.peft judge it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

import fastlora
from fastlora import dropout_mask, oracle
from fastlora.dropout import draw_seed, keep_scale
from fastlora.peft import fallbacks, layers

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

FLOOR = oracle.FLOOR[torch.float32, torch.float32]  # 2 * FLOOR: two results that are each within it of the truth
ATTENTION = ["q_proj", "v_proj"]
Steps = Callable[[nn.Module], Any]

#: kind -> (class in transformers, options of its config). The models have no dropout: only the adapters draw random numbers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", CAUSAL),
    "qwen2": ("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", CAUSAL),
    "gemma": ("GemmaForCausalLM", CAUSAL),
    "mistral": ("MistralForCausalLM", {**CAUSAL, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "roberta": ("RobertaForSequenceClassification", {**BERT, "max_position_embeddings": 40}),
    # Gated GELU, as in T5 1.1: at a ReLU's kink one rounding turns a whole gradient.
    "t5": ("T5ForConditionalGeneration", {**T5, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", {**BERT, "image_size": 16, "patch_size": 4}),
}

#: name -> (dtype of the base, autocast); the adapters are float32 in all of them.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "mixed": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "mixed-autocast": (torch.bfloat16, torch.bfloat16),
}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights and biases, the same ones each time."""
    torch.manual_seed(0)
    name, options = MODELS[kind]
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **options})


def wrap(model: nn.Module, *, autocast_adapter_dtype: bool = True, **options: Any) -> peft.PeftModel:
    """`model` with random adapters (B = 0 would hide any mistake) on every linear, in training mode."""
    wrapped = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(wrapped)
    return wrapped.train()


def accelerated(model: nn.Module | None = None, **options: Any) -> peft.PeftModel:
    wrapped = wrap(model or build(), **options)
    fastlora.accelerate(wrapped)
    return wrapped


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 2) -> None:
    """Draw A and B so that the adapters weigh as much as the base."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 12)


def inputs_of(kind: str = "llama", seed: int = 1, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn((batch, 3, 16, 16), generator=generator)}
    ids = torch.randint(2, 64, (batch, 13), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if kind == "t5" else {"input_ids": ids}


def logits_of(model: nn.Module, inputs: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    inputs = inputs_of() if inputs is None else inputs
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora_" not in name)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return model(**inputs, **options).logits


def curve(model: nn.Module, kind: str, steps: int) -> Tensor:
    """The losses of some training steps."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for step in range(steps):
        loss = logits_of(model, inputs_of(kind, seed=step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def run(model: nn.Module, inputs: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """The logits, and the gradient of every trainable parameter for a random gradient of the logits."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = logits_of(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **grads}


class MaskedDropout(nn.Module):
    """Dropout as PEFT's layer calls it, with the mask that an accelerated layer draws at the same place.

    A layer that shares x takes the seed of the `leader` of its group, and the mask of its place in it.
    """

    def __init__(self, p: float, leader: "MaskedDropout | None" = None, place: int = 0) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.leader = [leader or self]  # in a list: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.place == 0:
            self.seed = draw_seed(x.device)
        mask = dropout_mask(self.leader[0].seed, x[..., 0].numel(), x.shape[-1], self.p, projection=self.place)
        return x * mask.view(x.shape) * keep_scale(self.p)


def with_masked_dropout(model: nn.Module, groups: Sequence[Sequence[str]] = ()) -> nn.Module:
    """A copy of PEFT's model whose adapters drop what accelerated ones drop, with these groups of layers that share x."""
    model = copy.deepcopy(model)
    found = layers.find(model)
    for group in [*groups, *([name] for name in found if not any(name in group for group in groups))]:
        for place, name in enumerate(group):
            for adapter, dropout in found[name].lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    leader = found[group[0]].lora_dropout[adapter] if place else None
                    found[name].lora_dropout[adapter] = MaskedDropout(dropout.p, leader, place).train(dropout.training)
    return model


def bound_of(eager: float, floor: float) -> float:
    return max(oracle.EAGER_FACTOR * eager, floor)


class Judged:
    """Σ ‖error‖² of an accelerated model and of PEFT's, by output, over several inputs and masks.

    One rounding moves every later number of a network, so the two errors of a single draw differ by luck. In the first draw
    each layer computes alone; in the others, layers that share x are one call.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast_dtype: torch.dtype | None = None,
        exact: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> None:
        self.autocast_dtype = autocast_dtype
        self.fused = copy.deepcopy(model)
        self.model, self.exact = model, exact
        assert fastlora.accelerate(self.fused).taken
        self.sums: dict[str, Tensor] = {}  # of the errors of the accelerated model, of those of PEFT's, of the truth

    def add(self, inputs: dict[str, Tensor], seed: int) -> None:
        eager_model = with_masked_dropout(self.model, self.groups())
        truth = run(self.exact(eager_model).double(), inputs, seed)
        with autocast(self.autocast_dtype):
            fused, eager = run(self.fused, inputs, seed), run(eager_model, inputs, seed)
        for name, ref in truth.items():
            assert fused[name].dtype == eager[name].dtype, name
            sums = torch.stack([t.square().sum() for t in (fused[name] - ref, eager[name] - ref, ref)])
            self.sums[name] = self.sums.get(name, 0) + sums

    def groups(self) -> Sequence[Sequence[str]]:
        """The names of layers whose masks have one seed."""
        return fastlora.peft.status(self.fused).groups

    def failures(self, floor: float) -> list[str]:
        relative = {name: (sums[:2] / sums[2]).sqrt().tolist() for name, sums in self.sums.items()}
        return [
            f"{name}: {ours:.2e}, PEFT {own:.2e}" for name, (ours, own) in relative.items() if not ours <= bound_of(own, floor)
        ]


@contextmanager
def counted_calls() -> Iterator[list[Any]]:
    """The calls of `lora_linear` that accelerated layers make, or would make alone: a fallback cannot pass for a success."""
    made: list[Any] = []

    def linears(x: Tensor, projections: Sequence[Any], **options: Any) -> tuple[Tensor, ...]:
        made.extend(mock.call(x, *projection) for projection in projections)
        return fastlora.lora_linears(x, projections, **options)

    def linear(*tensors: Tensor, **options: Any) -> Tensor:
        made.append(mock.call(*tensors, **options))
        return fastlora.lora_linear(*tensors, **options)

    with mock.patch("fastlora.peft.fused.lora_linear", linear), mock.patch("fastlora.blocks.sharing.lora_linears", linears):
        yield made


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model as PEFT made it, and an accelerated copy; in evaluation mode."""
    eager = wrap(build(), **{"target_modules": ATTENTION, **options}).eval()
    fused = copy.deepcopy(eager)
    fastlora.accelerate(fused)
    return eager, fused


@torch.no_grad()
def both(eager: nn.Module, fused: nn.Module, steps: Steps = lambda model: None, **options: Any) -> list[Tensor]:
    """The logits of both models after `steps`."""
    for model in (eager, fused):
        steps(model)
    return [logits_of(model, **options) for model in (eager, fused)]


def assert_fused(eager: nn.Module, fused: nn.Module, steps: Steps = lambda model: None, layers_run: int = 4) -> Tensor:
    """The logits of `fused` after `steps`: PEFT's within the oracle's floor, with that many fused calls."""
    with counted_calls() as made:
        expected, result = both(eager, fused, steps)
    assert len(made) == layers_run
    assert oracle.relative_error(result, expected) <= FLOOR
    return result


def assert_same(eager: nn.Module, fused: nn.Module, reason: str, steps: Steps = lambda model: None, **options: Any) -> Tensor:
    """The logits of `fused` after `steps`: PEFT's bit for bit, by PEFT's forward, for this reason."""
    with counted_calls() as made:
        expected, result = both(eager, fused, steps, **options)
    assert not made
    assert torch.equal(result, expected)
    assert reason in fallbacks(fused)
    return result


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and equal(first, second)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(oracle.relative_error(tensor.detach(), other[name].detach()) <= 2 * FLOOR for name, tensor in one.items())
