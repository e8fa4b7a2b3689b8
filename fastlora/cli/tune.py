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
    from fastlora import dispatch, tune  # they import Triton, which no other command needs to start

    dtype = common.DTYPES[args.dtype]
    adapters = common.DTYPES[args.adapter_dtype or args.dtype]
    try:
        oracle.Case((1, 1, 1), dtype=dtype, adapter_dtype=adapters)  # refuses what cannot be judged
        rates = sorted({p for p in args.dropout if threshold(p)})
        if len(rates) > 1:
            raise ValueError(f"-p takes one rate above 0, which stands for all of them, got {', '.join(map(str, rates))}")
        dropouts = [threshold(p) > 0 for p in args.dropout]
        problems = tune.problems_for(shapes_of(args.model), args.rows, args.rank, dropouts, dtype)
        target = tune.check_device(args.device)  # last: wrong arguments are reported without a GPU too
        options: dict[str, Any] = {"adapter_dtype": adapters, "repeats": args.repeats, "again": args.again}
        tuning = tune.tune(problems, args.device, dropout_p=max(rates, default=0.1), **options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return common.refuse("tune", str(error))
    outcomes: list[Tuned] = []
    _, stderr = common.consoles()
    try:
        with common.progress(len(problems)) as step:
            for tuned in tuning:
                outcomes.append(tuned)
                remarks = [f"{tuned.problem}: {choice} is left out: {reason}" for choice, reason in tuned.left_out.items()]
                if tuned.skipped:
                    remarks.append(f"{tuned.problem} is skipped: {tuned.skipped}")
                for remark in remarks:
                    stderr.print(remark, style="yellow", markup=False, soft_wrap=True)
                step(str(tuned.problem))
    finally:  # an interruption or a lost device still shows what is stored
        kept = sum(tuned.kept for tuned in outcomes)
        measured = sum(tuned.choice is not None for tuned in outcomes) - kept
        facts = {"device": target.name, "file": dispatch.path_of(target), "problems": len(problems)}
        facts |= {"measured": measured, "kept": kept}
        if args.json:
            print(common.to_json({**facts, "rows": [_row(tuned) for tuned in outcomes]}))
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
    with torch.device("meta"):
        network = transformers.AutoModel.from_config(config)
    linears = match_targets(network, ALL_LINEAR).values()
    shapes = [linear.get_parameter("weight").shape[:: 1 if is_conv1d(linear) else -1] for linear in linears]
    return list(dict.fromkeys((k, n) for k, n in shapes))


def _print(outcomes: "Sequence[Tuned]", facts: dict[str, Any], repeats: int) -> None:
    """The table, and a summary below it."""
    stdout, _ = common.consoles()
    caption = (
        f"{facts['device']}, torch {torch.__version__}, median of {repeats} rounds; speed-up over the default (p20 to p80)"
    )
    headings = ("pass", "in x out", "M", "r", "dropout", "default", "chosen", "ms", "speed-up")
    columns = {heading: "right" if heading in ("M", "r", "ms", "speed-up") else "left" for heading in headings}
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


def _row(tuned: "Tuned") -> dict[str, Any]:
    """A problem's outcome in JSON's types."""
    fields = asdict(tuned)
    fields["dtype"] = str(tuned.problem.dtype).removeprefix("torch.")
    fields["seconds"] = {choice: times._asdict() for choice, times in tuned.seconds.items()}
    fields["speedup"] = tuned.speedup and tuned.speedup._asdict()
    return fields.pop("problem") | fields
