"""Adapt a causal language model to text with LoRA, twice side by side: with eager
LoRA linears and with FusedLoraLinear. Both runs start from the same weights and
see the same batches and the same dropout masks. Compare loss, time and memory,
and check every layer against float64.

Without --model, build a small byte-level Llama and pretrain it on the chapters
of the Python language reference. Without --text, adapt to the reference's pages
on built-in types, format strings and pdb. This takes one to two minutes on one
CPU core and downloads nothing.

examples:
  fastlora finetune
  fastlora finetune --steps 300 --r 16 --dropout 0.05
  fastlora finetune --model ./my-llama --text notes/ book.txt --dtype bfloat16

exit code: 0 all verdicts are positive, 1 one is not, 2 wrong arguments."""

import argparse
import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from fastlora.cli import common, progress
from fastlora.functional import BACKENDS, available_backends
from fastlora.injection.matching import ALL_LINEAR

DTYPES = ("float32", "bfloat16")


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    raw, summary = (
        argparse.RawDescriptionHelpFormatter,
        "fine-tune a language model with eager and with fused LoRA, and compare",
    )
    parser = subparsers.add_parser("finetune", help=summary, description=__doc__, formatter_class=raw)
    parser.set_defaults(func=run)

    def number(flags: str, kind: type, default: float, text: str, expected: str, holds: Callable[[Any], bool]) -> None:
        def parse(value: str) -> Any:
            try:
                if holds(kind(value)):
                    return kind(value)
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(f"got {value!r}, expected {expected}")

        group.add_argument(*flags.split(), type=parse, default=default, metavar="N", help=f"{text} (default: {default})")

    def count(flags: str, default: int, text: str, least: int = 1) -> None:
        number(flags, int, default, text, f"an integer of at least {least}", lambda value: value >= least)

    def positive(flags: str, default: float, text: str) -> None:
        number(flags, float, default, text, "a finite number above 0", lambda value: 0 < value < inf)

    group = parser.add_argument_group("model, text, results")
    add = group.add_argument
    add("--model", type=Path, metavar="FOLDER", help="local Hugging Face model; its tokenizer is used if it has one")
    add("--text", type=Path, nargs="+", default=[], metavar="PATH", help="text: files, or folders of .txt .md .rst")
    add("--output", type=Path, default="fastlora-finetune", metavar="FOLDER", help="of the results (default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON to standard output, and nothing else")

    group = parser.add_argument_group("LoRA")
    targets = "linears to adapt: names, ends of names, a regular expression for the full name, or all-linear (the default)"
    group.add_argument("--target-modules", nargs="+", default=[ALL_LINEAR], metavar="NAME", help=targets)
    count("--r --rank", 8, "rank")
    positive("--alpha", 16.0, "the update is scaled by alpha / r")
    number("--dropout", float, 0.1, "dropout rate before A", "a rate in [0, 1)", lambda value: 0 <= value < 1)

    group = parser.add_argument_group("training")
    count("--steps", 200, "optimizer steps")
    count("--batch-size", 8, "sequences per step")
    count("--seq-len", 128, "tokens per sequence", least=2)
    positive("--lr", 1e-2, "peak learning rate")
    number("--seed", int, 0, "of weights, batches and masks", "an integer in [0, 2**63)", lambda value: 0 <= value < 2**63)
    checks = "check every layer against float64, and bound the distance of the loss curves by a third run, the control"
    group.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help=checks)

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--dtype", choices=DTYPES, default="float32", help="of the frozen model (default: %(default)s)")
    add("--adapter-dtype", choices=DTYPES, default="float32", help="of A and B (default: %(default)s)")
    add("--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", choices=BACKENDS, help="of the fused linears (default: triton on a GPU, torch on a CPU)")
    add("--threads", type=common.positive_int, metavar="N", help="CPU threads (default: 1 for the small model, else torch's)")

    group = parser.add_argument_group("the small model, built without --model")
    number("--hidden-size", int, 128, "width", "a multiple of 32, the size of a head", lambda n: n > 0 and n % 32 == 0)
    count("--layers", 2, "depth")
    count("--pretrain-steps", 600, "steps of pretraining", least=0)
    positive("--pretrain-lr", 2e-3, "peak learning rate of pretraining")


def run(args: argparse.Namespace) -> int:
    """Run the job; 0 when every verdict is positive, 1 when one is not, 2 when the arguments do not fit."""
    for module, extra in (("matplotlib", "cli"), ("rich", "cli"), ("safetensors", "hf"), ("transformers", "hf")):
        common.require(module, extra)
    from fastlora.finetune import report, train

    args.target_modules = _targets(args.target_modules)
    backends = available_backends(args.device)
    try:
        if args.adapter_dtype not in ("float32", args.dtype):
            raise ValueError(f"--adapter-dtype: got {args.adapter_dtype!r}, expected float32 unless --dtype is the same")
        if args.backend not in (None, *backends):
            raise ValueError(f"--backend: got {args.backend!r}, expected {' or '.join(backends)} on {args.device}")
        prepared = train.prepare(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return common.refuse("finetune", str(error))
    with progress.shown(silent=args.json) as after_step:
        result = train.run(args, *prepared, after_step)
    (args.output / "report.json").write_text(report.to_json(result) + "\n", encoding="utf-8")
    report.plot(result, args.output / "loss.png")
    print(report.to_json(result)) if args.json else report.show(result)
    return 0 if result["passed"] else 1


def _targets(values: list[str]) -> str | tuple[str, ...]:
    """Several values are names.  A single value is a name, or, when it has other characters, a regular expression."""
    is_name = values[0] != ALL_LINEAR and re.fullmatch(r"[\w.]+", values[0])
    return tuple(values) if len(values) > 1 or is_name else values[0]
