"""Adapters on disk, in the format of PEFT: adapter_model.safetensors and adapter_config.json in one folder."""

from fastlora.adapters.files import from_pretrained, load_adapter, save_adapter

__all__ = ["from_pretrained", "load_adapter", "save_adapter"]
