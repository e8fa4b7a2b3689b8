"""Text for `fastlora finetune`: read prose, split it, turn it into tokens and batches.

The default text is the Python language reference, which ships with Python as `pydoc_data.topics`.  It has two parts in
different styles.  The model is pretrained on the chapters about the language.  It is then adapted to the pages about built-in
types, format strings and the debugger.

Every seventh block of the adaptation text is held out.  The reference repeats whole chapters, so each paragraph is kept once,
over all parts: no held-out paragraph is ever trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_TOPICS = ("debugger", "formatstrings", "string-methods", "typesmapping", "typesseq")
TEXT_SUFFIXES = (".md", ".rst", ".txt")
HELD_OUT_PERIOD = 7
HELD_OUT_BLOCK = 2000  # characters; fewer when the text is shorter than seven such blocks

Tokenize = Callable[[str], Iterable[int]]


def load_corpus(paths: Sequence[Path] = ()) -> dict[str, str]:
    """Three texts without a common paragraph: `pretrain`, `adapt` and `held_out`.

    `paths` are files and folders to adapt to; without any, Python's own library pages are used.

    Raises:
        ValueError: a path that is not UTF-8 text, or a folder without a text file.
        ImportError: this Python lacks pydoc_data, which some distributions leave out of their minimal package.
    """
    from pydoc_data.topics import topics

    documents = [text for path in paths for text in _read(path)] or [topics[name] for name in LIBRARY_TOPICS if name in topics]
    seen: set[str] = set()
    paragraphs = list(_new_paragraphs(documents, seen))
    sizes = [len(paragraph) for paragraph in paragraphs]
    block = min(HELD_OUT_BLOCK, sum(sizes) / HELD_OUT_PERIOD)
    parts: dict[bool, list[str]] = {False: [], True: []}  # whether held out
    for paragraph, start in zip(paragraphs, accumulate(sizes, initial=0), strict=False):
        parts[start // block % HELD_OUT_PERIOD == HELD_OUT_PERIOD - 1].append(paragraph)
    language = [topics[name] for name in sorted(topics) if name not in LIBRARY_TOPICS]
    texts = {"pretrain": _new_paragraphs(language, seen), "adapt": parts[False], "held_out": parts[True]}
    return {name: "\n\n".join(text) for name, text in texts.items()}


def tokenize_corpus(corpus: dict[str, str], tokenize: Tokenize, seq_len: int) -> dict[str, Tensor]:
    """Each text as an int64 stream of tokens; `held_out` is cut into windows, (n, seq_len).

    Raises ValueError when a text is too short: the adaptation text needs `seq_len` tokens, and the held-out text two windows,
    because one window has no standard error.
    """
    tokens = {name: torch.tensor(list(tokenize(text)), dtype=torch.int64) for name, text in corpus.items()}
    adapt, held_out = len(tokens["adapt"]), len(tokens["held_out"])
    if adapt < seq_len or held_out < 2 * seq_len:
        found = f"{adapt} tokens to train on and {held_out} held out are too few for seq_len={seq_len}"
        least = f"expected at least {seq_len} and {2 * seq_len}"
        raise ValueError(f"--text: {found}: {least}; give more text or a smaller --seq-len")
    return tokens | {"held_out": tokens["held_out"].unfold(0, seq_len, seq_len)}


def batches(stream: Tensor, batch_size: int, seq_len: int, seed: int) -> Iterator[Tensor]:
    """Yield (batch_size, seq_len) windows from random places of `stream`, without end; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    windows = stream.unfold(0, seq_len, 1)
    while True:
        yield windows[torch.randint(len(windows), (batch_size,), generator=generator)]


def _read(path: Path) -> Iterator[str]:
    files = sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--text: the folder {str(path)!r} holds no {', '.join(TEXT_SUFFIXES)} file")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: {str(file)!r} cannot be read, expected UTF-8 text: {error}") from error


def _new_paragraphs(documents: Iterable[str], seen: set[str]) -> Iterator[str]:
    """The paragraphs that are not in `seen`, in order; adds them to `seen`."""
    for paragraph in "\n\n".join(documents).split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph.strip("\n")
