"""torch's encoder layers out of their fast path, which reads their linears' weights and would leave adapters out.

`torch.backends.mha` switches that path for the whole process and forgets it; a flag on the module lasts and is pickled with it.
"""

from torch import nn

from fastlora.injection.walk import lora_layers

# The flag of each class, and the value that keeps it out of the fast path.
_FLAGS: dict[type[nn.Module], tuple[str, int]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),  # nested tensors, which it makes of padded ones, need the fast path
}


def leave(model: nn.Module) -> None:
    """Set the flags of the encoders in `model` that hold LoRA layers."""
    for module in model.modules():
        for kind, (flag, off) in _FLAGS.items():
            if isinstance(module, kind) and hasattr(module, flag) and lora_layers(module):
                vars(module).setdefault("lora_fast_path", {})[flag] = getattr(module, flag)
                setattr(module, flag, off)


def take_again(model: nn.Module) -> None:
    """Undo `leave`."""
    for module in model.modules():
        vars(module).update(vars(module).pop("lora_fast_path", {}))
