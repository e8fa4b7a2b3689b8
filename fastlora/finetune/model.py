"""The language model that is adapted: a local Hugging Face folder, or a small Llama built and pretrained on the spot."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.finetune.data import Tokenize, batches
from fastlora.finetune.settings import Settings
from fastlora.injection.inject import inject
from fastlora.modules import FusedLoraLinear

BYTES = 256  # the vocabulary of a model without a tokenizer: UTF-8 bytes
HEAD_SIZE = 32

Step = Callable[[int, float], None]


def load_tokenizer(settings: Settings) -> Tokenize:
    """The tokenizer of the model's folder, or UTF-8 bytes where there is none.

    Raises ValueError when the folder is no model, has a vocabulary too small for bytes, or a context below seq_len.
    """
    transformers = import_transformers()
    folder = settings.model
    if folder is None:
        return _bytes
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: {str(folder)!r} is not a Hugging Face model folder: it holds no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and settings.seq_len > context:
        raise ValueError(f"--seq-len: got {settings.seq_len}, expected at most the {context} positions of {str(folder)!r}")
    if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if config.vocab_size < BYTES:
        raise ValueError(
            f"--model: {str(folder)!r} holds no tokenizer, and its vocabulary of {config.vocab_size} is too small for bytes"
        )
    return _bytes


def load_base(settings: Settings) -> nn.Module:
    """The model in the folder, or a new small Llama, untrained; in float32 until it is pretrained."""
    transformers = import_transformers()
    if settings.model is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            settings.model, local_files_only=True, dtype=settings.base_dtype
        ).to(settings.device)
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // HEAD_SIZE,
        max_position_embeddings=max(settings.seq_len, 2048),
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(settings.device)


def pretrain(model: nn.Module, stream: Tensor, settings: Settings, on_step: Step) -> None:
    """Train every parameter of `model` on `stream`; `on_step(step, loss)` hears of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pretrain_lr)
    schedule = warm_up_and_decay(optimizer, settings.pretrain_steps)
    source = batches(stream, settings.batch_size, settings.seq_len, settings.seed)
    model.train()
    for step in range(settings.pretrain_steps):
        loss = next_token_loss(model, next(source).to(settings.device)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())


def with_adapters(base: nn.Module, settings: Settings, layer: type[FusedLoraLinear]) -> nn.Module:
    """A copy of `base`, which shares its weights, with LoRA linears of class `layer` on the backend that `settings` asks for.

    The initial A is the same for every class.
    """
    model = copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    torch.manual_seed(settings.seed)
    inject(
        model,
        target_modules=settings.target_modules,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        adapter_dtype=settings.lora_dtype,
        layer=layer,
    )
    for module in model.modules():
        if isinstance(module, layer):
            module.backend = settings.backend
    return model


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of each row's next tokens, mean over the row, in float32: ids (batch, seq_len) -> (batch,)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over the first tenth of the steps and falls to zero over the rest, both linearly."""
    warm_up = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )


def import_transformers() -> Any:
    """transformers, imported only now, without a bar of its own while it loads a model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _bytes(text: str) -> list[int]:
    return list(text.encode())
