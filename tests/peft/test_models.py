"""Families of models beside those of test_parity.py: every linear is accelerated, and the gradients are PEFT's."""

from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
import transformers
from peft_models import CAUSAL, FLOOR, TEXT, randomise

import fastlora
from fastlora.oracle import relative_error

BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "dropout": 0.0,
    "activation_function": "gelu",
}
BART |= {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("attention_heads", 2), ("ffn_dim", 48))}

#: family -> (class in transformers, options of its config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "Cohere": ("CohereForCausalLM", CAUSAL),
    "Falcon": ("FalconForCausalLM", TEXT),
    "Gemma 3": ("Gemma3ForCausalLM", CAUSAL),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TEXT),
    "Granite": ("GraniteForCausalLM", CAUSAL),
    "OLMo 2": ("Olmo2ForCausalLM", CAUSAL),
    "OPT": ("OPTForCausalLM", {**OPT, "activation_function": "gelu"}),
    "Phi": ("PhiForCausalLM", TEXT),
    "Phi-3": ("Phi3ForCausalLM", {**TEXT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}),
    "SmolLM3": ("SmolLM3ForCausalLM", CAUSAL),
    "StarCoder2": ("Starcoder2ForCausalLM", {**CAUSAL, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "BERT": ("BertForSequenceClassification", BERT),
    "DeBERTa-v2": ("DebertaV2ForSequenceClassification", BERT),
    "DistilBERT": ("DistilBertForSequenceClassification", {**DISTIL, "seq_classif_dropout": 0.0}),
    "ModernBERT": ("ModernBertForSequenceClassification", TEXT),
    "BART": ("BartForConditionalGeneration", BART),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_taken_and_computes_what_peft_does(family: str) -> None:
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    model_class = getattr(transformers, name)
    model = peft_models.wrap(model_class(model_class.config_class(**options, pad_token_id=0)))
    randomise(model)
    ids = torch.randint(1, 64, (2, 8))

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, report = results(), fastlora.accelerate(model)
    assert (report.left, report.waiting) == ((), ())
    # Two results that are each within the floor of the truth; gradients pass through many layers, so all of them together.
    logits, *gradients = results()
    assert relative_error(logits, expected[0]) <= 2 * FLOOR
    assert relative_error(*(torch.cat([g.flatten() for g in grads]) for grads in (gradients, expected[1:]))) <= 2 * FLOOR
    assert fastlora.peft.fallbacks(model) == {}


def test_the_page_names_the_families() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [family for family in FAMILIES if family not in page] == []
