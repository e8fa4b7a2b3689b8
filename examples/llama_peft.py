"""Train a Llama with PEFT adapters on the query and value projections; one line makes them fused.

python examples/llama_peft.py                        # a small Llama with random weights; no download
python examples/llama_peft.py --model ./my-llama     # your own checkpoint
"""

import argparse
from collections.abc import Sequence

import torch
from offline import SENTENCES, check_that_it_falls, checkpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", help="folder for the adapter")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint_name = args.model or checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint_name).to(device)

    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    report = fastlora.accelerate(model)  # <- the one line; the rest is a normal PEFT script
    print(report)

    model.train()
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(args.steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    check_that_it_falls(losses)
    assert report.taken, report
    assert set(fastlora.peft.fallbacks(model)) <= {fastlora.peft.SMALL}  # every call was fused, or too small on a CPU
    if args.output:
        model.save_pretrained(args.output)  # PEFT's file: it loads with or without fastlora


if __name__ == "__main__":
    main()
