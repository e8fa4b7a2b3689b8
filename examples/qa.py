"""Train an encoder to find answers in a text, with PEFT, accelerated and without PEFT, side by side.

The data is a file in SQuAD's format, version 1.1 or 2.0.  Exact match and F1 are those of SQuAD's own script.

python examples/qa.py                                      # a small BERT with random weights, sums in words; no download
python examples/qa.py --model ./my-bert --data train-v1.1.json --held-out dev-v1.1.json --steps 1000
"""

import json
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import three_ways
import torch
from offline import SENTENCES, checkpoint
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

WINDOW, STRIDE = 384, 128  # tokens of question and context; tokens that two windows of one context share
LONGEST = 30  # tokens of an answer


class Question(NamedTuple):
    """`answers` holds (text, where it starts in the context); none where the context does not say it."""

    text: str
    context: str
    answers: list[tuple[str, int]]


#: What is a plus b?  The context says it in its fifth word.
SUMS = [Question(s.partition(" is ")[0], s, [(s.split()[4], s.index(" is ") + len(" is "))]) for s in SENTENCES]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = three_ways.parser(__doc__, "a file in SQuAD's format").parse_args(argv)
    training, held_out = three_ways.data(args, read, SUMS, key=lambda question: question.context)
    name = args.model or checkpoint("bert", AutoModelForQuestionAnswering)
    tokenizer = AutoTokenizer.from_pretrained(name)
    windows = Windows(tokenizer, training)
    asked = Windows(tokenizer, held_out)
    unanswerable = any(not question.answers for question in training)

    def build() -> nn.Module:
        torch.manual_seed(0)  # of the head
        return AutoModelForQuestionAnswering.from_pretrained(name).to(three_ways.device())

    def batches() -> Iterator[three_ways.Batch]:
        generator = torch.Generator().manual_seed(0)
        places = torch.tensor([windows.place(i) for i in range(len(windows))], device=three_ways.device())
        while True:
            for drawn in torch.randperm(len(windows), generator=generator).split(args.batch_size):
                start, end = places[drawn].unbind(1)
                yield {**windows.batch(drawn.tolist()), "start_positions": start, "end_positions": end}

    @torch.no_grad()
    def answer(model: nn.Module) -> list[three_ways.Answer]:
        """The best span of all windows of each question; "" where that scores higher and training had such questions."""
        best = [("", -float("inf"))] * len(held_out)
        silent = [float("inf")] * len(held_out)
        for chunk in torch.arange(len(asked)).split(32):
            output = model(**asked.batch(chunk.tolist()))
            for i, start, end in zip(chunk.tolist(), output.start_logits.float(), output.end_logits.float(), strict=True):
                question, found = asked.question[i], asked.best_span(i, start, end)
                best[question] = max(best[question], found, key=lambda answer: answer[1])
                silent[question] = min(silent[question], float(start[0] + end[0]))
        return [("", no) if unanswerable and no > yes[1] else yes for yes, no in zip(best, silent, strict=True)]

    def figures(answers: list[three_ways.Answer]) -> str:
        pairs = [(text, question) for (text, _), question in zip(answers, held_out, strict=True)]
        exact, f1 = (
            100 * sum(score(text, question) for text, question in pairs) / len(pairs) for score in (exact_match, f1_score)
        )
        return f"exact match {exact:.1f} %, F1 {f1:.1f} % of {len(pairs):,}"

    three_ways.run(__file__, argv, args, three_ways.Task(build, "qa_outputs", batches, answer, figures))


class Windows:
    """Questions with their contexts as tokens; a context that is too long is cut into windows that overlap."""

    def __init__(self, tokenizer: object, questions: list[Question]) -> None:
        self.tokenizer, self.questions = tokenizer, questions
        self.encoded = tokenizer(
            [question.text.strip() for question in questions],
            [question.context for question in questions],
            truncation="only_second",
            max_length=min(WINDOW, tokenizer.model_max_length),
            stride=min(STRIDE, tokenizer.model_max_length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        self.question = self.encoded.pop("overflow_to_sample_mapping")
        self.offsets = self.encoded.pop("offset_mapping")

    def __len__(self) -> int:
        return len(self.question)

    def batch(self, indices: list[int]) -> three_ways.Batch:
        """The model's inputs for these windows, padded."""
        rows = {name: [values[i] for i in indices] for name, values in self.encoded.items()}
        return self.tokenizer.pad(rows, return_tensors="pt").to(three_ways.device())

    def context(self, i: int) -> range:
        """The positions of window `i` that hold the context."""
        part = self.encoded.sequence_ids(i)
        return range(part.index(1), len(part) - part[::-1].index(1))

    def place(self, i: int) -> tuple[int, int]:
        """First and last token of the first answer; (0, 0), the position of [CLS], where window `i` does not hold all of it."""
        question = self.questions[self.question[i]]
        for text, start in question.answers[:1]:
            held = [t for t in self.context(i) if self.offsets[i][t][0] < start + len(text) and self.offsets[i][t][1] > start]
            if held and self.offsets[i][held[0]][0] <= start and self.offsets[i][held[-1]][1] >= start + len(text):
                return held[0], held[-1]
        return 0, 0

    def best_span(self, i: int, start: Tensor, end: Tensor) -> three_ways.Answer:
        """The part of the context with the highest start + end logit, at most LONGEST tokens, and this sum."""
        tokens = self.context(i)
        scores = start[tokens.start : tokens.stop, None] + end[None, tokens.start : tokens.stop]
        allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST - 1)
        scores = scores.masked_fill(~allowed, -float("inf"))
        first, last = divmod(int(scores.argmax()), len(tokens))
        (begin, _), (_, stop) = (self.offsets[i][tokens[t]] for t in (first, last))
        return self.questions[self.question[i]].context[begin:stop], float(scores[first, last])


def exact_match(guess: str, question: Question) -> float:
    """1 where the guess is an answer, after `normal`."""
    return float(any(normal(guess) == normal(answer) for answer in accepted(question)))


def f1_score(guess: str, question: Question) -> float:
    """The F1 of the words of guess and answer, as bags; of several answers the best."""
    return max(word_f1(normal(guess).split(), normal(answer).split()) for answer in accepted(question))


def word_f1(guess: list[str], answer: list[str]) -> float:
    common = sum((Counter(guess) & Counter(answer)).values())
    if not guess or not answer:
        return float(guess == answer)
    return 2 * common / (len(guess) + len(answer))


def accepted(question: Question) -> list[str]:
    """The answers that are not empty after `normal`; "" where there is none."""
    return [text for text, _ in question.answers if normal(text)] or [""]


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def read(path: Path) -> list[Question]:
    """The questions of a file in SQuAD's format.  Exits with a message where it is something else."""
    try:
        paragraphs = [p for article in json.loads(path.read_text(encoding="utf-8"))["data"] for p in article["paragraphs"]]
        entries = [(p["context"], entry) for p in paragraphs for entry in p["qas"]]
        found = [
            Question(entry["question"], context, [(a["text"], a["answer_start"]) for a in entry["answers"]])
            for context, entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: expected a file in SQuAD's format, got {type(error).__name__}: {error}") from error
    for question in found:
        if not question.context.strip():
            raise SystemExit(f"{path}: the context of {question.text!r} is empty")
        for text, start in question.answers:
            if question.context[start : start + len(text)] != text:
                raise SystemExit(f"{path}: the answer {text!r} to {question.text!r} is not at {start} of its context")
    return found


if __name__ == "__main__":
    main()
