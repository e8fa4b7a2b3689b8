"""What the examples use instead of downloads: sentences, a tokenizer for their words, a model with random weights."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from statistics import fmean

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
SENTENCES = [f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]} ." for a in range(7) for b in range(6)]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(encoder: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of SENTENCES; for an encoder it adds <cls> and <sep>, as BERT's does."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<eos>"] + encoder * ["<cls>", "<sep>"]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    if encoder:
        ids = [(name, words.token_to_id(name)) for name in ("<cls>", "<sep>")]
        pair = "<cls> $A <sep> $B:1 <sep>:1"
        words.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", pair=pair, special_tokens=ids)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


def checkpoint(kind: str, load: type = AutoModelForCausalLM, **options: object) -> str:
    """A folder with a small model of this kind ("llama", ...) and its tokenizer; deleted at exit."""
    folder = tempfile.mkdtemp(prefix=f"fastlora-{kind}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = tokenizer(encoder=load is not AutoModelForCausalLM)
    special = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(words), max_position_embeddings=64, **SIZES, **special, **options)
    load.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def check_that_it_falls(losses: Sequence[float]) -> None:
    """Exit with an error unless the mean loss of the last quarter of the steps is below that of the first quarter."""
    quarter = len(losses) // 4
    if quarter:
        first, last = fmean(losses[:quarter]), fmean(losses[-quarter:])
        print(f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps")
        if not last < first:
            raise SystemExit("the loss did not fall: try more --steps")
