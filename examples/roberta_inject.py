"""Train a RoBERTa classifier without PEFT: adapters on query and value, biases and LayerNorms, as published for GLUE.

The encoder trains 416,256 of the classifier's 124,647,170 parameters, 0.33 %.  Its adapter file has 1.7 MB.  The new head
trains whole and is saved beside the adapter.

python examples/roberta_inject.py                        # a small RoBERTa with random weights; no download
python examples/roberta_inject.py --size base            # the published size, with random weights
python examples/roberta_inject.py --model ./my-roberta   # your own checkpoint
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from offline import check_that_it_falls
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

import fastlora

SIZES = {
    "base": {"max_position_embeddings": 514, "type_vocab_size": 1},  # all else: RobertaConfig's defaults
    "small": {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a RoBERTa (default: random weights)")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the model with random weights")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="folder for the adapter and the head")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.model:
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**SIZES[args.size]))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    _, total = fastlora.get_nb_trainable_parameters(model)

    # The one call. It freezes the encoder except adapters, biases and LayerNorms; the head is not part of the encoder.
    fastlora.inject(
        model.roberta, target_modules=["query", "value"], r=8, lora_alpha=8, bias="all", modules_to_save=["LayerNorm"]
    )
    trained, _ = fastlora.get_nb_trainable_parameters(model.roberta)
    print(f"encoder: {trained:,} trainable parameters of {total:,} in all, {100 * trained / total:.2f} %")

    # A task for random weights: are most tokens of the sentence from the lower half of the vocabulary?
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (32, 12), device=model.device)
    labels = ((ids < vocabulary // 2).sum(1) > 6).long()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    model.train()
    losses = []
    for _ in range(args.steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check_that_it_falls(losses)

    if args.output:
        fastlora.save_adapter(model.roberta, args.output)  # PEFT's format: PeftModel.from_pretrained reads it
        save_file(model.classifier.state_dict(), args.output / "head.safetensors")
        size = (args.output / "adapter_model.safetensors").stat().st_size
        print(f"adapter file: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
