"""loralib's layer: a LoRA linear that merges into its weight on eval() and unmerges on train().

Replace `loralib.Linear(in_features, out_features, r=16)` by `FusedLoraLinear(in_features, out_features, r=16, ...)`.

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
        # The one changed line. loralib merges by default; here, as in PEFT, you ask for it.
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

    # The LoRA linear freezes its weight and bias. loralib's mark_only_lora_as_trainable would freeze the head too.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check_that_it_falls(losses)

    model.hidden.lora_dropout = 0.0  # dropout off: both modes compute the same
    apart = model(x)
    model.eval()  # the weight is now W + scaling · B A: one matrix product for each call
    assert model.hidden.merged
    torch.testing.assert_close(model(x), apart)
    model.train()  # the weight is W again, bit for bit
    assert not model.hidden.merged
    assert torch.equal(model.hidden.weight, pretrained)
    print("merged on eval(), restored bit for bit on train()")


if __name__ == "__main__":
    main()
