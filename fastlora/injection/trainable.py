"""What of an injected model is trained, in PEFT's words."""

from torch import nn

from fastlora.validation import check_model


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all): the number of elements of `model`'s parameters, a tied one counted once.

    bitsandbytes packs two 4-bit weights into a byte; they count as the weights they are.
    """
    check_model(model)
    trained = {True: 0, False: 0}
    for parameter in model.parameters():
        packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
        trained[parameter.requires_grad] += parameter.numel() * packed
    return trained[True], sum(trained.values())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the counts of `get_nb_trainable_parameters` in PEFT's format.

    A module to save is trained in place and counts once; PEFT, which keeps the original beside a copy, counts it twice in
    "all params".
    """
    trainable, total = get_nb_trainable_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
