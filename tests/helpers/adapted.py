"""Small models, cases and names for the tests that compare inject and the adapter files with PEFT."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, max_position_embeddings=40)).eval()


def masked_roberta() -> nn.Module:
    torch.manual_seed(0)
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, max_position_embeddings=40)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).eval()


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bias all": (roberta, {"target_modules": ["query", "value"], "bias": "all"}),
    "tied biases": (masked_roberta, {"target_modules": ["query", "value"], "bias": "all"}),
    "bias lora_only": (roberta, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "modules to save": (roberta, {"target_modules": "all-linear", "modules_to_save": ["classifier", "LayerNorm"]}),
    "all of both": (roberta, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier", "LayerNorm"]}),
    "lora_only of both": (roberta, {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "exclude list": (roberta, {"target_modules": ["dense", "key"], "exclude_modules": ["output.dense", "classifier.dense"]}),
    "exclude regex": (roberta, {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*|classifier.*"}),
    "patterns": (
        roberta,
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {r"layer\.1\..*query": 3, "query": 2, "^classifier.dense": 5},
            "alpha_pattern": {r".*\.0\.attention\..*": 9.5, "value": 7},  # sorted: PEFT sorts them when it saves
        },
    ),
    "patterns with rslora": (roberta, {"target_modules": ["query", "value"], "rank_pattern": {".*1.*": 2}, "use_rslora": True}),
    "regex": (llama, {"target_modules": r".*\.1\..*(q|k)_proj"}),
    "names": (llama, {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"]}),
    "ALL-LINEAR": (llama, {"target_modules": "ALL-LINEAR"}),
    "one layer": (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}),
    "layers": (llama, {"target_modules": ["mlp.up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA of Conv1D": (gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"}),
    "all-linear of Conv1D": (gpt2, {"target_modules": "all-linear", "bias": "all"}),
    "tied head": (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "tied embeddings to save": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied head to save": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": (roberta, {"target_modules": ["word_embeddings", "position_embeddings", "query"], "bias": "all"}),
    "embedding and Conv1D": (gpt2, {"target_modules": ["wte", "c_attn"], "rank_pattern": {"wte": 2}}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding and head": (tied_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "both to save": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


def our_name(name: str) -> str:
    """The name here of a parameter of a PeftModel."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    return re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.default(\.weight)?", r".\1", name)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random values for all that is trainable, equal for what is one parameter here and in PEFT."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seed = int.from_bytes(hashlib.sha256(our_name(name).encode()).digest()[:4])
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / 4)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits
