"""`fastlora tune`: measure on this GPU which form of the kernels suits a model's linears, once, and keep it for later runs."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora import oracle
from fastlora.benchmark.plot import three_digits
from fastlora.cli import common
from fastlora.dropout import threshold

if TYPE_CHECKING:
    from fastlora.kernels.target import Target
    from fastlora.tune import Result

DESCRIPTION = """\
Measure, for every linear of a model, forward and backward, which form of the
kernels is fastest on this GPU: one fused GEMM, and with which tile, or the
vendor's GEMM on a prefilled output, or torch alone. Each candidate is checked
against float64 before it is timed. What wins replaces the default wherever
fastlora runs in the same environment: GPU, torch, Triton and fastlora.

A candidate replaces the default only where its 80th percentile is below the
default's 20th. Results are stored one by one, and what is stored is not
measured again: an interrupted run, started anew, goes on where it was. Two
runs at once keep both. They lie in $FASTLORA_CACHE_DIR, else
$XDG_CACHE_HOME/fastlora, else ~/.cache/fastlora; delete the file to forget it,
or replace what it holds with --again."""

EPILOG = """\
examples:
  fastlora tune --model ./my-llama
  fastlora tune --model Qwen/Qwen3-8B -M 2048 8192 -r 16 64
  fastlora tune --model 4096x4096,4096x14336,14336x4096 -M 8192 -p 0.05

exit code: 0 everything is measured, 1 a result was wrong or a problem could
not be measured, 2 wrong arguments or no GPU to tune on, 130 interrupted."""

ROWS = tuple(2**power for power in range(9, 15))
SHAPES = re.compile(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*")
HUB_ID = re.compile(r"(?![\dx,]+$|.*\.json$)\w[\w.-]*(/\w[\w.-]*)?")  # neither a misspelt shape nor a missing file


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which form of the kernels suits a model on this GPU, and keep it",
        description=DESCRIPTION,
        epilog=EPILOG,
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
    from fastlora import choices, tune  # they import Triton, which no other command needs to start

    dtype = common.DTYPES[args.dtype]
    adapters = common.DTYPES[args.adapter_dtype] if args.adapter_dtype else dtype
    try:
        oracle.Case((1, 1, 1), dtype=dtype, adapter_dtype=adapters)  # refuses what cannot be judged
        rate = _rate(args.dropout)
        shapes = shapes_of(args.model)
        target = tune.check_device(args.device)  # last: what is wrong anywhere is said without a GPU too
        file = choices.store(target, {})
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return common.refuse("tune", str(error))
    problems = tune.problems_for(shapes, args.rows, args.rank, {threshold(p) > 0: None for p in args.dropout}, dtype)
    results: list[Result] = []
    try:
        _measure(problems, args, adapters, rate, results)
    finally:  # what is stored is shown, whatever ended the run: an interruption, a lost device
        _report(results, len(problems), target, file, args)
    return 1 if any(result.wrong or result.choice is None for result in results) else 0


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
    transformers = common.require("transformers", "hf")
    from fastlora.injection.matching import ALL_LINEAR, is_conv1d, match_targets

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


def _measure(
    problems: Sequence[Any], args: argparse.Namespace, adapters: torch.dtype, rate: float, results: "list[Result]"
) -> None:
    """Add each result to `results` when it has been stored."""
    from rich.progress import Progress

    from fastlora import tune

    _, stderr = common.consoles()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("tuning", total=len(problems))

        def finished(result: "Result") -> None:
            results.append(result)
            progress.advance(task)

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


def _report(results: "Sequence[Result]", total: int, target: "Target", file: Path, args: argparse.Namespace) -> None:
    kept = sum(result.kept for result in results)
    found = [result for result in results if result.choice is not None and not result.kept]
    if args.json:
        facts = {"device": target.name, "file": str(file), "problems": total, "measured": len(found), "kept": kept}
        print(json.dumps({**facts, "rows": [_plain(result) for result in results]}, indent=2))
        return
    stdout, _ = common.consoles()
    if results:
        stdout.print(_table(results, target, args.repeats))
    if kept:
        stdout.print(f"{kept} of {total} problems kept from earlier runs; --again measures them anew.", soft_wrap=True)
    changed = sum(result.choice != result.default for result in found)
    summary = f"{len(found)} of {total} problems measured, {changed} better than the default. Stored: {file}"
    stdout.print(summary, soft_wrap=True)


def _table(results: "Sequence[Result]", target: "Target", repeats: int) -> Any:
    from rich import box
    from rich.table import Table

    from fastlora import tune

    caption = f"{target.name}, torch {torch.__version__}, median of {repeats} rounds; speed-up over the default (p20 to p80)"
    table = Table(title="the fastest form of each step", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("pass", "in x out"):
        table.add_column(heading)
    for heading in ("M", "r"):
        table.add_column(heading, justify="right")
    for heading in ("dropout", "default", "chosen", "tile"):
        table.add_column(heading)
    for heading in ("ms", "speed-up"):
        table.add_column(heading, justify="right")
    for result in results:
        problem, choice, speedup = result.problem, result.choice, result.speedup
        shape = f"{problem.in_features}x{problem.out_features}"
        facts = [problem.direction, shape, str(problem.rows), str(problem.r), "on" if problem.dropout else "off"]
        if choice is None:
            table.add_row(*facts, result.default.form, "[yellow]skipped")
            continue
        gain = "" if speedup is None else f"{speedup.median:.2f} ({speedup.p20:.2f} to {speedup.p80:.2f})"
        if choice == result.default:
            gain = ""
        table.add_row(
            *facts,
            result.default.form,
            choice.form if choice == result.default else f"[green]{choice.form}",
            tune.tile_of(choice),
            "kept" if result.kept else three_digits(result.seconds[choice].median * 1e3),
            gain,
        )
    return table


def _plain(result: "Result") -> dict[str, Any]:
    """A result in JSON's types."""
    from fastlora.tune import name_of

    problem = {**asdict(result.problem), "dtype": str(result.problem.dtype).removeprefix("torch.")}
    return {
        **problem,
        "default": name_of(result.default),
        "choice": result.choice and name_of(result.choice),
        "speedup": result.speedup and result.speedup._asdict(),
        "seconds": {name_of(choice): times._asdict() for choice, times in result.seconds.items()},
        "left_out": {name_of(choice): reason for choice, reason in result.left_out.items()},
        "skipped": result.skipped,
        "kept": result.kept,
    }
