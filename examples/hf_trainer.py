"""Train an accelerated PEFT model with transformers' Trainer: activation checkpointing, evaluation and saving work as usual.

python examples/hf_trainer.py                        # a small Llama with random weights; no download
python examples/hf_trainer.py --model ./my-llama     # your own checkpoint
"""

import argparse
import tempfile
from collections.abc import Sequence

from datasets import Dataset
from offline import SENTENCES, check_that_it_falls, checkpoint
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    set_seed(0)
    checkpoint_name = args.model or checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint_name)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))

    report = fastlora.accelerate(model)  # <- the one line, before or after you create the Trainer
    print(report)

    data = Dataset.from_dict({"text": SENTENCES})
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text").train_test_split(6, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                args.output or scratch,
                max_steps=args.steps,
                per_device_train_batch_size=12,
                learning_rate=5e-3,
                gradient_checkpointing=True,  # redraws the same dropout masks
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
        trainer.save_model()

    check_that_it_falls([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert report.taken, report
    assert set(fastlora.peft.fallbacks(model)) <= {fastlora.peft.SMALL}  # every call was fused, or too small on a CPU


if __name__ == "__main__":
    main()
