"""Which form a step takes on this GPU: what `fastlora tune` measured, where it did, else what arithmetic says.

Measurements live in files in a cache folder, one for each environment: GPU (name, capability, multiprocessors), torch, Triton
and fastlora.  A file is written anew and put into place at once, under a lock, with what it held before; one that is damaged
or of another environment is ignored with a warning.  A float32 choice holds for the matmul precision it was measured in.

    $FASTLORA_CACHE_DIR, else $XDG_CACHE_HOME/fastlora, else ~/.cache/fastlora
"""

import fcntl
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import torch
import triton

from fastlora import atomic
from fastlora._version import __version__
from fastlora.kernels.config import GemmConfig, gemm_candidates
from fastlora.kernels.dot import matmul_precision
from fastlora.kernels.forms import Choice, Problem, default_choice, next_power_of_2
from fastlora.kernels.target import Target

FORMAT = 1  # of the files

Key = tuple[Problem, str]  # the problem, and the precision of its products

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TILE = [field.name for field in fields(GemmConfig)]
_PROBLEM = [field.name for field in fields(Problem)]

_lock = threading.RLock()  # of the two tables below; `choose` only reads them, or adds what any thread would add
_known: dict[Target, dict[Key, Choice]] = {}  # what the file says, and the defaults that were asked for besides
_tried: dict[tuple[Target, Key], Choice] = {}
_warned: set[Path] = set()
_stores = 0
_revision = 0
_revisions: dict[tuple[int, frozenset[Any]], int] = {(0, frozenset()): 0}  # their numbers, by what they stand for


def revision() -> int:
    """Of the choices that hold: what was planned at another revision may rest on other ones."""
    return _revision


def choose(problem: Problem, target: Target) -> Choice:
    """The form of one step.  Reads a file at the first call for a target, and never measures."""
    key = problem, matmul_precision(problem.dtype)
    if _tried and (target, key) in _tried:
        return _tried[target, key]
    known = _known.get(target)
    if known is None:
        known = _look(target)
    choice = known.get(key)
    if choice is None:
        choice = known[key] = default_choice(problem, target)
    return choice


@contextmanager
def trying(choices: Mapping[Problem, Choice], target: Target) -> Iterator[None]:
    """Make these choices hold for the time being, in all threads: autograd runs backward in one of its own."""
    global _tried
    _look(target)  # now, because the thread of backward could not take the lock
    with _lock:
        before = _tried
        _tried = before | {(target, _key(problem)): choice for problem, choice in choices.items()}
        _revise()
        try:
            yield
        finally:
            _tried = before
            _revise()


def store(target: Target, results: Mapping[Problem, Choice]) -> Path:
    """Add measured choices to the target's file, which is returned, and let them hold from now on.

    Raises:
        ValueError: a target without a name, or a choice that its problem cannot take.
        OSError: the folder or the file cannot be written; the file is as it was.
    """
    global _stores
    if not target.name:
        raise ValueError("target.name is empty: what is measured is kept under the name of a GPU")
    added = dict(_parse(_record(_key(problem), choice), target) for problem, choice in results.items())
    path = path_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock, path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        measured = _read(target) | added
        records = [_record(key, choice) for key, choice in measured.items()]
        content = json.dumps({"environment": environment(target), "results": records}, indent=1) + "\n"
        atomic.write(path, content.encode(), locked=True)
        _known[target] = measured
        _stores += 1
        _revise()
    return path


def stored(target: Target) -> dict[Problem, Choice]:
    """What the target's file holds now, as any process left it, for the matmul precision in force."""
    return {problem: choice for (problem, precision), choice in _read(target).items() if (problem, precision) == _key(problem)}


def tiles(problem: Problem, target: Target) -> list[GemmConfig]:
    """The tiles that the fused form can take for a problem whose tensors are contiguous."""
    return _tiles(problem, matmul_precision(problem.dtype), target)


def uses_descriptors(problem: Problem, target: Target) -> bool:
    """Whether the GEMM of a problem whose tensors are contiguous goes through tensor descriptors: its rows are aligned."""
    widths = problem.in_features, problem.out_features
    return target.has_descriptors and all(width * problem.dtype.itemsize % 16 == 0 for width in widths)


def fingerprint(target: Target) -> str | None:
    """Of the target's file, which tells times from before and after a tune apart; None where there is none."""
    try:
        return hashlib.sha256(path_of(target).read_bytes()).hexdigest()[:10]
    except (OSError, RuntimeError):
        return None


def environment(target: Target) -> dict[str, Any]:
    """What a measurement holds for."""
    gpu = {"gpu": target.name, "capability": target.capability, "multiprocessors": target.sms}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "fastlora": __version__}
    return {"format": FORMAT, **gpu, **versions}


def path_of(target: Target) -> Path:
    """The file of the target's environment.  Raises RuntimeError where there is no home folder to put it in."""
    facts = environment(target)
    words = [target.name, *(f"{name} {facts[name]}" for name in ("torch", "triton", "fastlora"))]
    readable = "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words)[:150]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    return _folder() / f"{readable}-{digest}.json"


def _folder() -> Path:
    if own := os.environ.get("FASTLORA_CACHE_DIR"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "fastlora"


def _revise() -> None:
    """The same choices on trial again are the same revision, so that a tuner plans each of them once."""
    global _revision
    _revision = _revisions.setdefault((_stores, frozenset(_tried.items())), len(_revisions))


def _key(problem: Problem) -> Key:
    return problem, matmul_precision(problem.dtype)


def _look(target: Target) -> dict[Key, Choice]:
    with _lock:
        if target not in _known:
            _known[target] = _read(target) if target.name else {}
        return _known[target]


def _read(target: Target) -> dict[Key, Choice]:
    """What the target's file says; nothing, and a warning for the first time, where it cannot be believed."""
    path = None
    try:
        path = path_of(target)
        return _choices(json.loads(path.read_text("utf-8")), target)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or lists nested too deep
        where = path or Path("the cache of measured choices")
        if where not in _warned:
            _warned.add(where)
            warnings.warn(f"{where} is ignored: {error}; `fastlora tune` writes it anew", stacklevel=2)
        return {}


def _choices(data: Any, target: Target) -> dict[Key, Choice]:
    """The choices in a file's data.  Raises ValueError where it says anything else."""
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        raise ValueError("it holds no list of results")
    if (found := data.get("environment")) != (here := environment(target)):
        raise ValueError(f"it is for {found}, and this is {here}")
    return dict(_parse(record, target) for record in data["results"])


def _record(key: Key, choice: Choice) -> dict[str, Any]:
    problem, precision = key
    facts = asdict(problem) | {"dtype": str(problem.dtype).removeprefix("torch.")}
    return {**facts, "precision": precision, "form": choice.form, "tile": choice.config and list(astuple(choice.config))}


def _parse(record: Any, target: Target) -> tuple[Key, Choice]:
    """The inverse of `_record`.  Raises ValueError for a record that `store` would not write for this target."""
    if not isinstance(record, dict) or record.keys() != {*_PROBLEM, "precision", "form", "tile"}:
        raise ValueError(f"{record!r} is no result: expected {', '.join(_PROBLEM)}, precision, form and tile")
    sizes = [record[name] for name in ("rows", "in_features", "out_features", "r")]
    dtype = _DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
    valid = (
        dtype is not None
        and all(type(size) is int and size > 0 for size in sizes)
        and record["rows"] == next_power_of_2(record["rows"])
        and record["direction"] in ("forward", "backward")
        and type(record["dropout"]) is bool
        and record["precision"] in (("ieee", "tf32") if dtype == torch.float32 else ("ieee",))
    )
    if not valid or dtype is None:
        raise ValueError(f"{record!r} is no problem that a step poses")
    problem = Problem(**{name: record[name] for name in _PROBLEM} | {"dtype": dtype})
    form, tile = record["form"], record["tile"]
    if form not in problem.forms:
        raise ValueError(f"the form {form!r} is none that {problem} can take")
    config = None
    if tile is not None:
        allowed = {astuple(config): config for config in _tiles(problem, record["precision"], target)}
        numbers = isinstance(tile, list) and all(type(number) is int for number in tile)
        config = allowed.get(tuple(tile)) if numbers and form == "fused" else None
        if config is None:
            raise ValueError(
                f"{dict(zip(_TILE, tile, strict=False)) if numbers else tile!r} is no tile of {form} for {problem}"
            )
    return (problem, record["precision"]), Choice(form, config)


def _tiles(problem: Problem, precision: str, target: Target) -> list[GemmConfig]:
    dtype, descriptors = problem.dtype, uses_descriptors(problem, target)
    return [config for config in gemm_candidates(dtype, precision) if config.is_valid(target, dtype, precision, descriptors)]
