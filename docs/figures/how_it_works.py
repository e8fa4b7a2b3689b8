"""Draw how_it_works.svg: the tensors that each kernel of one training step streams, eager LoRA beside fastlora.

python docs/figures/how_it_works.py              # writes the SVG beside this script
python docs/figures/how_it_works.py --png x.png  # also writes a PNG, to look at

A bar is a tensor, its length the tensor's bytes at M = 8192, in = out = 4096, r = 16 in bfloat16.  Each kernel reads and writes
each of its tensors once; tiles that a GEMM reads again are not counted.  Not drawn: A, B, S and dS, which are thin, the draw of
the seed, and the sums of partial results.  The picture shows the form `fused`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

SVG = Path(__file__).with_suffix(".svg")

#: MiB of the tensors that are not (M, in) or (M, out).  The mask of torch's dropout is a byte an element, `bits` a bit.
MIB = {"W": 32, "mask": 32, "bits": 4}
MIB_OF_OTHERS = 64


class Kernel(NamedTuple):
    """One kernel: its formula, the tensors that the frozen linear's GEMM moves too, and those that LoRA adds."""

    formula: str
    frozen: tuple[str, str] = ("", "")  # read, written
    added: tuple[str, str] = ("", "")


EAGER = {
    "forward": [
        Kernel("y₀ = x Wᵀ + bias", frozen=("x W", "y₀")),
        Kernel("D = dropout(x)", added=("x", "D mask")),
        Kernel("S = D Aᵀ", added=("D", "")),
        Kernel("T = S Bᵀ", added=("", "T")),
        Kernel("T′ = scaling · T", added=("T", "T′")),
        Kernel("y = y₀ + T′", added=("y₀ T′", "y")),
    ],
    "backward": [
        Kernel("dT = scaling · dy", added=("dy", "dT")),
        Kernel("dB = dTᵀ S", added=("dT", "")),
        Kernel("dS = dT B", added=("dT", "")),
        Kernel("dA = dSᵀ D", added=("D", "")),
        Kernel("dD = dS A", added=("", "dD")),
        Kernel("dx₁ = mask(dD)", added=("dD mask", "dx₁")),
        Kernel("dx₀ = dy W", frozen=("dy W", "dx₀")),
        Kernel("dx = dx₀ + dx₁", added=("dx₀ dx₁", "dx")),
    ],
}
FUSED = {
    "forward": [
        Kernel("S = dropout(x) Aᵀ", added=("x", "")),
        Kernel("y = x Wᵀ + bias\n      + scaling · S Bᵀ", frozen=("x W", "y")),
    ],
    "backward": [
        Kernel("dS = scaling · dy B\ndB = scaling · dyᵀ S", added=("dy", "")),
        Kernel("dA = dSᵀ dropout(x)", added=("x", "bits")),
        Kernel("dx = dy W\n      + mask(dS A)", frozen=("dy W", "dx"), added=("bits", "")),
    ],
}
SAVED = {"eager LoRA": "D, mask and S", "fastlora": "x, S, 8-byte seed"}

CONDITIONS = (
    "Length of a bar: bytes, in bfloat16 at M = 8192, in = out = 4096, r = 16, each tensor once for each kernel. "
    "Not drawn: A, B, S, dS,\nwhich are thin, the draw of the seed, and the sums of partial results."
)

WIDTH, HEIGHT = 980, 696
ROW, BAR = 31, 19
SCALE = 58 / 64  # length of a MiB
INK, SOFT, CARD, LINE = "#1f2328", "#59636e", "#ffffff", "#d0d7de"
FROZEN, ADDED = "#3d6fb4", "#c2410c"


def size(tensor: str) -> int:
    """MiB of a tensor."""
    return MIB.get(tensor, MIB_OF_OTHERS)


def moved(tensors: str) -> int:
    """MiB of all the tensors."""
    return sum(map(size, tensors.split()))


def bars(axes: Axes, left: float, y: float, frozen: str, added: str) -> None:
    """A row of labelled bars that begins at `left`."""
    for tensors, colour in ((frozen, FROZEN), (added, ADDED)):
        for tensor in tensors.split():
            length = size(tensor) * SCALE
            axes.add_patch(Rectangle((left, y - BAR / 2), length, BAR, color=colour, linewidth=0))
            inside = length > 20
            at, colour_of_text = (left + length / 2, "white") if inside else (left + length + 13, colour)
            axes.text(at, y, tensor, color=colour_of_text, size=10, ha="center", va="center_baseline")
            left += length + 3


def column(axes: Axes, left: float, title: str, steps: dict[str, list[Kernel]], pitch: float) -> None:
    """One implementation: its kernels from top to bottom, `pitch` apart."""
    axes.text(left, 36, title, color=INK, size=17, weight="bold", va="center")
    axes.text(left + 178, 36, f"keeps for backward: {SAVED[title]}", color=INK, size=12, va="center")
    reads, writes = left + 178, left + 330
    y = 70.0
    for direction, kernels in steps.items():
        for x, text in ((left, direction), (reads, "reads"), (writes, "writes")):
            axes.text(x, y, text, color=SOFT, size=12, va="center", weight="bold" if x == left else "normal")
        at = y + 28 + (pitch - ROW) / 2
        for kernel in kernels:
            axes.text(left, at, kernel.formula, color=INK, size=12.5, va="center", linespacing=1.15)
            for x, frozen, added in zip((reads, writes), kernel.frozen, kernel.added, strict=True):
                bars(axes, x, at, frozen, added)
            at += pitch
        at -= (pitch - ROW) / 2
        frozen, added = (sum(moved(" ".join(part)) for part in parts) for parts in zip(*(k[1:] for k in kernels), strict=True))
        axes.text(left, at, f"{len(kernels)} kernels", color=INK, size=12.5, va="center", weight="bold")
        axes.text(reads, at, f"{frozen} MiB", color=FROZEN, size=12.5, va="center", weight="bold")
        axes.text(reads + 66, at, f"+  {added} MiB", color=ADDED, size=12.5, va="center", weight="bold")
        y += 28 + len(EAGER[direction]) * ROW + 38


def draw() -> Figure:
    """The picture, one unit a point."""
    mpl.rcParams.update({"svg.hashsalt": "fastlora", "font.family": "DejaVu Sans"})  # the same bytes at each run
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    corners = "round,pad=0,rounding_size=10"
    axes.add_patch(FancyBboxPatch((2, 2), WIDTH - 4, HEIGHT - 4, boxstyle=corners, facecolor=CARD, edgecolor=LINE))
    column(axes, 26, "eager LoRA", EAGER, ROW)
    column(axes, 516, "fastlora", FUSED, 1.5 * ROW)
    y = HEIGHT - 62
    for left, colour, text in ((26, FROZEN, "what the frozen linear moves too"), (290, ADDED, "what LoRA adds")):
        axes.add_patch(Rectangle((left, y - 7), 14, 14, color=colour, linewidth=0))
        axes.text(left + 21, y, text, color=INK, size=12, va="center")
    axes.text(26, y + 17, CONDITIONS, color=SOFT, size=11, va="top", linespacing=1.4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Write the SVG, and a PNG where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, default=SVG, help="default: beside this script")
    parser.add_argument("--png", type=Path, help="also write a PNG here")
    args = parser.parse_args(argv)
    figure = draw()
    figure.savefig(args.svg, metadata={"Date": None})
    if args.png:
        figure.savefig(args.png, dpi=100)


if __name__ == "__main__":
    main()
