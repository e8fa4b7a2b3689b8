"""The main job of the command line: the same fine-tuning run with eager and with fused LoRA linears, compared and checked."""
