"""loralib's layer: a linear with a LoRA bypass that merges into its weight on eval() and comes apart again on train().

What was `lora.Linear(in_features, out_features, r=16)` becomes `FusedLoraLinear(in_features, out_features, r=16, ...)`.

python examples/loralib_merge.py
"""

import argparse
from collections.abc import Sequence

import torch
from offline import check_that_it_falls
from torch import nn

from fastlora import FusedLoraLinear


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # The one changed line. loralib merges by default; here, as in PEFT, it has to be asked for.
        self.hidden = FusedLoraLinear(width, 4 * width, r=8, lora_alpha=16, lora_dropout=0.1, merge_weights=True)
        self.head = nn.Linear(4 * width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x).relu())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Classifier(64)
    x = torch.randn(256, 64)
    labels = (x[:, :8].sum(1) > 0).long()
    pretrained = model.hidden.weight.clone()

    # Frozen are the weight and bias of the LoRA linear; loralib's mark_only_lora_as_trainable would freeze the head too.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check_that_it_falls(losses)

    model.hidden.lora_dropout = 0.0  # to compare the two modes, which differ in dropout otherwise
    apart = model(x)
    model.eval()  # W + scaling · B A: one matrix product a call, no adapter left to compute
    assert model.hidden.merged
    torch.testing.assert_close(model(x), apart)
    model.train()  # W again, bit for bit, however often the mode changes
    assert not model.hidden.merged
    assert torch.equal(model.hidden.weight, pretrained)
    print("merged on eval(), restored bit for bit on train()")


if __name__ == "__main__":
    main()
