"""Supervised fine-tuning with TRL: SFTTrainer creates the PEFT model, so accelerate it after that.

python examples/trl_sft.py                        # a small Llama with random weights; no download
python examples/trl_sft.py --model ./my-llama     # your own checkpoint
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from offline import SENTENCES, check_that_it_falls, checkpoint
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", help="folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    checkpoint_name = args.model or checkpoint("llama")
    prompts, completions = zip(*(sentence.split("is") for sentence in SENTENCES), strict=True)
    data = Dataset.from_dict({"prompt": [f"{prompt}is" for prompt in prompts], "completion": completions})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint_name),
            processing_class=AutoTokenizer.from_pretrained(checkpoint_name),
            args=SFTConfig(
                args.output or scratch,
                max_steps=args.steps,
                per_device_train_batch_size=12,
                use_cpu=not torch.cuda.is_available(),
                learning_rate=5e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

        report = fastlora.accelerate(trainer.model)  # <- the one line, after you create the trainer and before train()
        print(report)

        trainer.train()
        trainer.save_model()

    check_that_it_falls([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert report.taken, report
    assert set(fastlora.peft.fallbacks(trainer.model)) <= {fastlora.peft.SMALL}  # every call was fused, or too small on a CPU


if __name__ == "__main__":
    main()
