"""For every linear of a model, measure which form of the kernels is fastest on
this GPU, forward and backward: one fused GEMM and with which tile, or cuBLAS
accumulating onto the LoRA term, or torch alone. Each candidate is checked
against float64 before it is timed. The winner replaces the default wherever
fastlora runs in the same environment: GPU, torch, Triton and fastlora.

A candidate wins only if its 80th percentile is below the default's 20th.
Results are stored one by one and not measured again: an interrupted run, when
started anew, continues. Two runs at once keep both. The file lies in
$FASTLORA_CACHE_DIR, else $XDG_CACHE_HOME/fastlora, else ~/.cache/fastlora.
Delete it to return to the defaults, or measure again with --again.

examples:
  fastlora tune --model ./my-llama
  fastlora tune --model Qwen/Qwen3-8B -M 2048 8192 -r 16 64
  fastlora tune --model 4096x4096,4096x14336,14336x4096 -M 8192 -p 0.05

exit code: 0 everything is measured, 1 a result is wrong or a problem cannot be
measured, 2 wrong arguments or no GPU to tune on, 130 interrupted."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora import oracle
from fastlora.cli import common
from fastlora.cli.common import three_digits
from fastlora.dropout import threshold

if TYPE_CHECKING:
    from fastlora.tune import Tuned

ROWS = tuple(2**power for power in range(9, 15))
SHAPES = re.compile(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*")
HUB_ID = re.compile(r"(?![\dx,]+$|.*\.json$)\w[\w.-]*(/\w[\w.-]*)?")  # neither a misspelt shape nor a missing file


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which form of the kernels suits a model on this GPU, and keep it",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, number = parser.add_argument, common.positive_int
    add(
        "--model", required=True, metavar="MODEL",
        help="a config.json or its folder, a hub id, or shapes: in x out, as in 4096x4096,4096x14336; of a model, every linear "
        "but the output head",
    )  # fmt: skip
    add(
        "-M", "--rows", type=number, nargs="+", default=list(ROWS), metavar="M",
        help="rows of x, tokens in the batch, each counted as the next power of two (default: 512 to 16384)",
    )  # fmt: skip
    add("-r", "--rank", type=number, nargs="+", default=[16], metavar="R", help="LoRA ranks (default: 16)")
    add(
        "-p", "--dropout", type=common.probability, nargs="+", default=[0.0, 0.1], metavar="P",
        help="dropout rates: 0, another, or both; that one stands for every rate above 0 (default: 0 0.1)",
    )  # fmt: skip
    add("--dtype", choices=common.DTYPES, default="bfloat16", help="of x, weight and bias (default: %(default)s)")
    add("--adapter-dtype", choices=common.DTYPES, help="of A and B: that dtype or float32 (default: that dtype)")
    add("--repeats", type=number, default=20, metavar="N", help="timed rounds (default: 20)")
    add(
        "--again", action="store_true",
        help="measure also what an earlier run has stored (default: keep it, whatever -p, --adapter-dtype and --repeats were)",
    )  # fmt: skip
    add("--device", type=common.device, default=common.default_device(), help="cuda or cuda:N (default: the first GPU)")
    add("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, store, and print the table; the exit code."""
    common.require("rich")
    from rich.progress import Progress

    from fastlora import dispatch, tune  # they import Triton, which no other command needs to start

    dtype = common.DTYPES[args.dtype]
    adapters = common.DTYPES[args.adapter_dtype] if args.adapter_dtype else dtype
    try:
        oracle.Case((1, 1, 1), dtype=dtype, adapter_dtype=adapters)  # refuses what cannot be judged
        rate = _rate(args.dropout)
        shapes = shapes_of(args.model)
        target = tune.check_device(args.device)  # last: wrong arguments are reported without a GPU too
        file = dispatch.store(target, {})
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return common.refuse("tune", str(error))
    problems = tune.problems_for(shapes, args.rows, args.rank, {threshold(p) > 0: None for p in args.dropout}, dtype)
    outcomes: list[Tuned] = []
    _, stderr = common.consoles()
    progress = Progress(console=stderr, transient=True, disable=not stderr.is_terminal)
    task = progress.add_task("tuning", total=len(problems))

    def finished(tuned: "Tuned") -> None:
        outcomes.append(tuned)
        progress.advance(task)

    try:
        with progress:
            tune.tune(
                problems,
                args.device,
                adapter_dtype=adapters,
                dropout_p=rate,
                repeats=args.repeats,
                again=args.again,
                progress=lambda what: progress.update(task, description=what),
                finished=finished,
                remark=lambda what: stderr.print(what, style="yellow", markup=False, soft_wrap=True),
            )
    finally:  # an interruption or a lost device still shows what is stored
        measured = [tuned for tuned in outcomes if tuned.choice is not None and not tuned.kept]
        kept = sum(tuned.kept for tuned in outcomes)
        facts = {"device": target.name, "file": str(file), "problems": len(problems), "measured": len(measured), "kept": kept}
        if args.json:
            print(json.dumps({**facts, "rows": [_plain(tuned) for tuned in outcomes]}, indent=2))
        else:
            _print(outcomes, facts, args.repeats)
    return 1 if any(tuned.wrong or tuned.choice is None for tuned in outcomes) else 0


def shapes_of(model: str) -> list[tuple[int, int]]:
    """(in, out) of every linear of `model`, each once: given as such, or of the model that a configuration describes.

    Raises:
        ValueError, TypeError, OSError: there is no such configuration, or it describes no model with linears.
    """
    if SHAPES.fullmatch(model):
        pairs = (tuple(map(int, shape.split("x"))) for shape in model.split(","))
        return list(dict.fromkeys((k, n) for k, n in pairs))
    if not Path(model).exists() and not HUB_ID.fullmatch(model):
        raise ValueError(f"--model must be a config.json or its folder, a hub id, or shapes such as 4096x4096, got {model!r}")
    transformers = common.require("transformers")
    from fastlora.injection.layer_types import is_conv1d
    from fastlora.injection.matching import ALL_LINEAR, match_targets

    config = transformers.AutoConfig.from_pretrained(model)
    kinds = transformers.AutoModelForCausalLM, transformers.AutoModel
    kind = kinds[0] if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else kinds[1]
    with torch.device("meta"):
        network = kind.from_config(config)
    shapes = []
    for linear in match_targets(network, ALL_LINEAR).values():
        out_features, in_features = linear.get_parameter("weight").shape[:: -1 if is_conv1d(linear) else 1]
        shapes.append((in_features, out_features))
    return list(dict.fromkeys(shapes))


def _rate(dropouts: Sequence[float]) -> float:
    """The one rate above 0."""
    rates = {p for p in dropouts if threshold(p)}
    if len(rates) > 1:
        raise ValueError(f"-p takes one rate above 0, which stands for all of them, got {', '.join(map(str, sorted(rates)))}")
    return max(rates, default=0.1)


def _print(outcomes: "Sequence[Tuned]", facts: dict[str, Any], repeats: int) -> None:
    """The table, and a summary below it."""
    stdout, _ = common.consoles()
    sides = {"M": "right", "r": "right", "ms": "right", "speed-up": "right"}
    headings = ("pass", "in x out", "M", "r", "dropout", "default", "chosen", "ms", "speed-up")
    caption = (
        f"{facts['device']}, torch {torch.__version__}, median of {repeats} rounds; speed-up over the default (p20 to p80)"
    )
    columns = {heading: sides.get(heading, "left") for heading in headings}
    if outcomes:
        stdout.print(common.table("the fastest form of each step", columns, map(_cells, outcomes), caption))
    if facts["kept"]:
        line = f"{facts['kept']} of {facts['problems']} problems kept from earlier runs; --again measures them anew."
        stdout.print(line, soft_wrap=True)
    better = sum(tuned.choice not in (None, tuned.default) and not tuned.kept for tuned in outcomes)
    line = f"{facts['measured']} of {facts['problems']} problems measured, {better} better than the default."
    stdout.print(f"{line} Stored: {facts['file']}", soft_wrap=True)


def _cells(tuned: "Tuned") -> list[str]:
    problem, choice, speedup = tuned.problem, tuned.choice, tuned.speedup
    shape = f"{problem.in_features}x{problem.out_features}"
    facts = [problem.direction, shape, str(problem.rows), str(problem.r), "on" if problem.dropout else "off", tuned.default]
    if choice is None:
        return [*facts, "skipped", "", ""]
    time = "kept" if tuned.kept else three_digits(tuned.seconds[choice].median * 1e3)
    gain = f"{speedup.median:.2f} ({speedup.p20:.2f} to {speedup.p80:.2f})" if speedup and choice != tuned.default else ""
    return [*facts, choice, time, gain]


def _plain(tuned: "Tuned") -> dict[str, Any]:
    """A problem's outcome in JSON's types."""
    fields = asdict(tuned)
    return (
        fields.pop("problem")
        | fields
        | {
            "dtype": str(tuned.problem.dtype).removeprefix("torch."),
            "speedup": tuned.speedup and tuned.speedup._asdict(),
            "seconds": {choice: times._asdict() for choice, times in tuned.seconds.items()},
        }
    )
