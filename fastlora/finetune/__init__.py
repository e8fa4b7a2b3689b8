"""The job of `fastlora finetune`: one fine-tuning run with eager and one with fused LoRA linears, compared and checked."""
