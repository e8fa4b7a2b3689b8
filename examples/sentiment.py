"""Train a sentence classifier as published for GLUE, with PEFT, accelerated and without PEFT, side by side.

The data is a file in SST-2's format: a line `sentence<tab>label`, then the sentences with labels 0, 1, ...

python examples/sentiment.py                                            # a small BERT, sums in words; no download
python examples/sentiment.py --model ./my-bert --data train.tsv --held-out dev.tsv --steps 250

python -m tools.pretrained all-minilm-l6-v2 movie-reviews.tsv           # a real encoder, and real sentences
python examples/sentiment.py --model build/pretrained/all-minilm-l6-v2 --data build/pretrained/movie-reviews.tsv --steps 250
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import three_ways
import torch
from offline import SENTENCES, WORDS, checkpoint
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Row = tuple[str, int]
SUMS = [(sentence, int(WORDS.index(sentence.split()[4]) > 5)) for sentence in SENTENCES]  # is the sum above five?


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = three_ways.parser(__doc__, "a file in SST-2's format").parse_args(argv)
    training, held_out = three_ways.data(args, read, SUMS, key=lambda row: row[0])
    held_out.sort(key=lambda row: len(row[0]))  # sentences of one length need no padding
    classes = max(2, *(label + 1 for _, label in training))
    name = args.model or checkpoint("bert", AutoModelForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(sentences: Sequence[str]) -> three_ways.Batch:
        return tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(three_ways.device())

    def build() -> nn.Module:
        torch.manual_seed(0)  # of the head
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes).to(three_ways.device())

    def batches() -> Iterator[three_ways.Batch]:
        generator = torch.Generator().manual_seed(0)
        while True:
            for drawn in torch.randperm(len(training), generator=generator).split(args.batch_size):
                sentences, labels = zip(*(training[i] for i in drawn), strict=True)
                yield {**encode(sentences), "labels": torch.tensor(labels, device=three_ways.device())}

    @torch.no_grad()
    def answer(model: nn.Module) -> list[three_ways.Answer]:
        """The class of each held-out sentence, and its logit."""
        sentences = [sentence for sentence, _ in held_out]
        chunks = [sentences[i : i + 64] for i in range(0, len(sentences), 64)]
        best = [model(**encode(chunk)).logits.float().max(1) for chunk in chunks]
        return [found for b in best for found in zip(b.indices.tolist(), b.values.tolist(), strict=True)]

    def figures(answers: list[three_ways.Answer]) -> str:
        right = sum(guess == label for (guess, _), (_, label) in zip(answers, held_out, strict=True))
        return f"accuracy {100 * right / len(held_out):.1f} % of {len(held_out):,}"

    three_ways.run(__file__, argv, args, three_ways.Task(build, "classifier", batches, answer, figures))


def read(path: Path) -> list[Row]:
    """The sentences and labels of a file in SST-2's format.  Exits with a message where it is something else."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not lines or lines[0] != ["sentence", "label"]:
        raise SystemExit(f"{path}: the first line is {lines[0] if lines else 'missing'}, expected sentence<tab>label")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != 2 or not line[1].isdecimal():
            raise SystemExit(f"{path}:{number}: got {line}, expected a sentence, a tab and a label 0, 1, ...")
    return [(sentence.strip(), int(label)) for sentence, label in lines[1:]]


if __name__ == "__main__":
    main()
