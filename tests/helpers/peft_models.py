"""Tiny models from transformers, wrapped by PEFT, and what a run of one gives: shared by the tests of fastlora.peft."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastlora
from fastlora import dropout_mask, oracle
from fastlora.dropout import draw_seed, keep_scale
from fastlora.peft import fallbacks, layers

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FLOOR = oracle.FLOOR[torch.float32, torch.float32]  # 2 * FLOOR: two results that are each within it of the truth
ATTENTION = ["q_proj", "v_proj"]

#: The dropouts of the models themselves are off: only the adapters draw random numbers.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, num_key_value_heads=1)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CAUSAL)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**CAUSAL)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**CAUSAL, sliding_window=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**BERT, max_position_embeddings=40, num_labels=3)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",  # as T5 1.1; at a ReLU's kink one rounding turns a whole gradient
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{name: size for name, size in BERT.items() if name != "vocab_size"}, image_size=16, patch_size=4, num_labels=3
        )
    ),
}


def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights and biases, the same ones each time."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def wrap(model: nn.Module, *, autocast_adapter_dtype: bool = True, **options: Any) -> peft.PeftModel:
    """`model` with random adapters (a B of zeros would hide any mistake) on every linear, in training mode."""
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(wrapped)
    return wrapped.train()


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
    """Dropout as PEFT's layer calls it, with the mask that an accelerated layer draws at the same place."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = dropout_mask(draw_seed(x.device), x[..., 0].numel(), x.shape[-1], self.p)
        return x * mask.view(x.shape) * keep_scale(self.p)


def with_masked_dropout(model: nn.Module) -> nn.Module:
    """A copy of PEFT's model whose adapters drop what accelerated ones drop."""
    model = copy.deepcopy(model)
    for layer in layers.find(model).values():
        for adapter, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[adapter] = MaskedDropout(dropout.p).train(dropout.training)
    return model


def bound_of(eager: float, floor: float) -> float:
    return max(oracle.EAGER_FACTOR * eager, floor)


@contextmanager
def counted_calls() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of x in the calls of `lora_linear` that accelerated layers make: a fallback cannot pass for a success."""
    calls: list[tuple[int, ...]] = []
    original = layers.lora_linear

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "lora_linear", counted)
        yield calls


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model as PEFT made it, and an accelerated copy; in evaluation mode."""
    eager = wrap(build(), **{"target_modules": ATTENTION, **options}).eval()
    fused = copy.deepcopy(eager)
    fastlora.accelerate(fused)
    return eager, fused


@torch.no_grad()
def both(
    eager: nn.Module, fused: nn.Module, steps: Callable[[nn.Module], Any] = lambda model: None, **options: Any
) -> list[Tensor]:
    """The logits of both models after `steps`."""
    for model in (eager, fused):
        steps(model)
    return [logits_of(model, **options) for model in (eager, fused)]


def assert_fused(
    eager: nn.Module, fused: nn.Module, steps: Callable[[nn.Module], Any] = lambda model: None, layers_run: int = 4
) -> Tensor:
    with counted_calls() as made:
        expected, result = both(eager, fused, steps)
    assert len(made) == layers_run
    assert oracle.relative_error(result, expected) <= FLOOR
    return result


def assert_same(
    eager: nn.Module,
    fused: nn.Module,
    reason: str | None,
    steps: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> Tensor:
    with counted_calls() as made:
        expected, result = both(eager, fused, steps, **options)
    assert not made
    assert torch.equal(result, expected)
    assert set(fallbacks(fused)) >= ({reason} if reason else set())
    return result


def parameters_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
