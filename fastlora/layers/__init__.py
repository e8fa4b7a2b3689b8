"""The LoRA layers beside `FusedLoraLinear`, and what all of them share."""
