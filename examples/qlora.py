"""QLoRA: a 4-bit base (NF4, double quantisation); an 8-bit AdamW trains adapters, biases and the output head.

python examples/qlora.py                      # a small Llama with random weights; no download, no GPU
python examples/qlora.py --model ./my-llama   # your own checkpoint
"""

import argparse
from collections.abc import Sequence

import torch
from bitsandbytes.optim import AdamW8bit
from offline import SENTENCES, check_that_it_falls, checkpoint
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", help="folder for the adapter")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint_name = args.model or checkpoint("llama", attention_bias=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_name)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint_name, quantization_config=four_bits, device_map={"": device})
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})

    config = LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", bias="all", modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    report = fastlora.accelerate(model)  # <- the one line; each product makes its packed weight dense
    print(report)

    model.train()
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(args.steps):
        # prepare_model_for_kbit_training leaves float32 between the layers; autocast casts base and adapters to bf16.
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    check_that_it_falls(losses)
    assert report.taken, report
    assert set(fastlora.peft.fallbacks(model)) <= {fastlora.peft.SMALL}  # every call was fused, or too small on a CPU
    if args.output:
        model.save_pretrained(args.output)  # adapters, biases and head, without the base


if __name__ == "__main__":
    main()
