"""The language model to adapt: a local Hugging Face folder, or a small Llama that is built and pretrained on the spot."""

import copy
from argparse import Namespace

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fastlora.cli.common import DTYPES
from fastlora.finetune.data import Tokenize
from fastlora.injection.inject import inject
from fastlora.modules import FusedLoraLinear

BYTES = 256  # the vocabulary of a model without a tokenizer: UTF-8 bytes
HEAD_SIZE = 32


def load_tokenizer(args: Namespace) -> Tokenize:
    """The tokenizer in the model's folder, or UTF-8 bytes when there is none.

    Raises ValueError when the folder holds no model, or its model has too small a vocabulary for bytes or a context below
    seq_len.
    """
    folder = args.model
    if folder is None:
        return str.encode
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: {str(folder)!r} is not a Hugging Face model folder: it holds no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and args.seq_len > context:
        raise ValueError(f"--seq-len: got {args.seq_len}, expected at most the {context} positions of {str(folder)!r}")
    if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if config.vocab_size < BYTES:
        raise ValueError(
            f"--model: {str(folder)!r} holds no tokenizer, and its vocabulary of {config.vocab_size} is too small for bytes"
        )
    return str.encode


def load_base(args: Namespace) -> nn.Module:
    """The model in the folder, in `args.dtype`, or a new small Llama, untrained and in float32."""
    transformers.utils.logging.disable_progress_bar()
    if args.model is not None:
        dtype = DTYPES[args.dtype]
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True, dtype=dtype)
        return model.to(args.device)
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // HEAD_SIZE,
        max_position_embeddings=max(args.seq_len, 2048),
    )
    return transformers.LlamaForCausalLM(config).to(args.device)


def with_adapters(base: nn.Module, args: Namespace, layer: type[FusedLoraLinear]) -> nn.Module:
    """A copy of `base` that shares its weights, with LoRA linears of class `layer`; every class gets the same initial A."""
    model = copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    torch.manual_seed(args.seed)
    rates = {"lora_alpha": args.alpha, "lora_dropout": args.dropout}
    dtype = DTYPES[args.adapter_dtype]
    inject(model, target_modules=args.target_modules, r=args.r, **rates, adapter_dtype=dtype, layer=layer)
    for module in model.modules():
        if isinstance(module, layer):
            module.backend = args.backend
    return model


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the next tokens in nats, in float32, averaged over each row: ids (batch, seq_len) -> (batch,)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
