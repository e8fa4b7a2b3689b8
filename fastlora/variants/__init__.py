"""Other adapters of one linear than plain LoRA: DoRA, and several adapters at once."""
