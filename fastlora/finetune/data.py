"""Text for `fastlora finetune`: real prose in, streams of tokens and batches out.

By default the text is the Python language reference that ships with Python (`pydoc_data.topics`), in two parts of
different style: chapters about the language itself to pretrain on, and the manual pages of built-in types, format
strings and the debugger to adapt to. Every seventh block of the adaptation text is held out. A paragraph that occurs more
than once, in one part or in both (the reference repeats whole chapters), is kept once only, so nothing held out is ever
trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_TOPICS = ("debugger", "formatstrings", "string-methods", "typesmapping", "typesseq")
TEXT_SUFFIXES = (".md", ".rst", ".txt")
HELD_OUT_PERIOD = 7  # every seventh block is held out
HELD_OUT_BLOCK = 2000  # characters, fewer for a text that has no seven such blocks

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Three texts without a paragraph in common."""

    pretrain: str
    adapt: str
    held_out: str


@dataclass(frozen=True)
class Tokens:
    """A corpus as int64 token streams; `held_out` is cut into windows (n, seq_len)."""

    pretrain: Tensor
    adapt: Tensor
    held_out: Tensor


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Read the adaptation text from files and folders, or take Python's own library pages when `paths` is empty.

    Raises ValueError when a path does not exist or is not UTF-8 text, or a folder holds no text file.
    """
    language, library = _python_reference()
    documents = [text for path in paths for text in _read(path)] if paths else library
    seen: set[str] = set()
    adapt, held_out = _split([paragraph for document in documents for paragraph in _new_paragraphs(document, seen)])
    pretrain = [paragraph for document in language for paragraph in _new_paragraphs(document, seen)]
    return Corpus(*("\n\n".join(part) for part in (pretrain, adapt, held_out)))


def tokenize_corpus(corpus: Corpus, tokenize: Tokenize, seq_len: int) -> Tokens:
    """Turn each part into tokens.

    Raises ValueError when a part is too short: the adaptation text needs `seq_len` tokens, the held-out text two
    windows of `seq_len` (one gives no standard error).
    """
    pretrain, adapt, held_out = (
        torch.tensor(tokenize(text), dtype=torch.int64) for text in (corpus.pretrain, corpus.adapt, corpus.held_out)
    )
    windows = len(held_out) // seq_len
    if len(adapt) < seq_len or windows < 2:
        raise ValueError(
            f"text: {len(adapt)} tokens to train on and {len(held_out)} held out are too few for seq_len={seq_len}: "
            f"expected at least {seq_len} and {2 * seq_len}; give more text or a smaller --seq-len"
        )
    return Tokens(pretrain, adapt, held_out[: windows * seq_len].view(windows, seq_len))


def batches(stream: Tensor, batch_size: int, seq_len: int, seed: int) -> Iterator[Tensor]:
    """Yield (batch_size, seq_len) windows at random places of `stream`, without end, the same ones for one seed."""
    generator = torch.Generator().manual_seed(seed)
    windows = stream.unfold(0, seq_len, 1)
    while True:
        yield windows[torch.randint(len(windows), (batch_size,), generator=generator)]


def _python_reference() -> tuple[list[str], list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out of their minimal Python package
        raise ValueError("text: this Python lacks the module pydoc_data.topics, which the default run reads") from error
    library = [topics[name] for name in LIBRARY_TOPICS if name in topics]
    language = [topics[name] for name in sorted(topics) if name not in LIBRARY_TOPICS]
    return language, library


def _read(path: Path) -> Iterable[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"text: the folder {str(path)!r} holds no {', '.join(TEXT_SUFFIXES)} file")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"text: {str(path)!r} is neither a file nor a folder")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {str(file)!r} is not UTF-8 text ({error})") from error


def _new_paragraphs(document: str, seen: set[str]) -> list[str]:
    """The paragraphs of `document` that are not in `seen`, in order; adds them to `seen`."""
    new = []
    for paragraph in document.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            new.append(paragraph.strip("\n"))
    return new


def _split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """Paragraphs to train on, and those to hold out: spread over the whole text, as its style changes along the way."""
    block = min(HELD_OUT_BLOCK, sum(map(len, paragraphs)) / HELD_OUT_PERIOD)
    parts: tuple[list[str], list[str]] = [], []
    passed = 0
    for paragraph in paragraphs:
        parts[passed // block % HELD_OUT_PERIOD == HELD_OUT_PERIOD - 1].append(paragraph)
        passed += len(paragraph)
    return parts
