"""The language model to adapt: a local Hugging Face folder, or a small Llama that is built and pretrained on the spot."""

import copy
from argparse import Namespace
from functools import partial

import torch
import transformers
from torch import Tensor, nn

from fastlora.cli.common import DTYPES
from fastlora.finetune.data import Tokenize
from fastlora.injection.inject import inject
from fastlora.modules import FusedLoraLinear

BYTES = 256  # the vocabulary of a model without a tokenizer: UTF-8 bytes


def load_base(args: Namespace) -> tuple[nn.Module, Tokenize]:
    """The model in the folder, in `args.dtype`, and its tokenizer; or a new small Llama, untrained and in float32.

    The tokens are UTF-8 bytes for the small Llama and for a folder without a tokenizer.

    Raises ValueError when the folder holds no model, or its model has too small a vocabulary for bytes or a context below
    seq_len.
    """
    if args.model is None:
        torch.manual_seed(args.seed)
        config = transformers.LlamaConfig(
            vocab_size=BYTES,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 8 // 3 // 16 * 16,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 32,
            max_position_embeddings=max(args.seq_len, 2048),
        )
        return transformers.LlamaForCausalLM(config).to(args.device), str.encode
    folder = repr(str(args.model))
    tokenize: Tokenize = str.encode
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model: {folder} is not a Hugging Face model folder: it holds no config.json")
    config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
    context = getattr(config, "max_position_embeddings", None) or args.seq_len
    if args.seq_len > context:
        raise ValueError(f"--seq-len: got {args.seq_len}, expected at most the {context} positions of {folder}")
    if any(args.model.glob("tokenizer*")) or (args.model / "vocab.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        tokenize = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    elif config.vocab_size < BYTES:
        raise ValueError(f"--model: {folder} has no tokenizer and its vocabulary of {config.vocab_size} is too small for bytes")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(args.model, local_files_only=True, dtype=DTYPES[args.dtype]).to(args.device), tokenize


def with_adapters(base: nn.Module, args: Namespace, layer: type[FusedLoraLinear]) -> nn.Module:
    """A copy of `base` that shares its weights, with LoRA linears of class `layer`; every class gets the same initial A."""
    model = copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    torch.manual_seed(args.seed)
    lora = partial(inject, lora_alpha=args.alpha, lora_dropout=args.dropout, adapter_dtype=DTYPES[args.adapter_dtype])
    lora(model, target_modules=args.target_modules, r=args.r, layer=layer, groups=False)  # the control draws a mask a layer
    for module in model.modules():
        if isinstance(module, layer):
            module.backend = args.backend
    return model


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the next tokens in nats, in float32, averaged over each row: ids (batch, seq_len) -> (batch,)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
