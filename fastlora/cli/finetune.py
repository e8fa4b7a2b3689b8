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
from pathlib import Path
from typing import Any

from fastlora.backends import BACKENDS, available_backends
from fastlora.cli import common
from fastlora.injection.matching import ALL_LINEAR


def register(subparsers: Any) -> None:
    """Add the subcommand to `fastlora`."""
    parser = subparsers.add_parser("finetune", description=__doc__, help="fine-tune with eager and fused LoRA, and compare")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(func=run)

    def number(flags: str, kind: Any, default: float, text: str) -> None:
        add(*flags.split(), type=kind, default=default, metavar="N", help=f"{text} (default: {default})")

    add = parser.add_argument_group("model, text, results").add_argument
    add("--model", type=Path, metavar="FOLDER", help="local Hugging Face model; its tokenizer is used if it has one")
    add("--text", type=Path, nargs="+", default=[], metavar="PATH", help="text: files, or folders of .txt .md .rst")
    add("--output", type=Path, default="fastlora-finetune", metavar="FOLDER", help="of the results (default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON to standard output, and nothing else")

    add = parser.add_argument_group("LoRA").add_argument
    targets = "linears to adapt: names, ends of names, a regular expression for the full name, or all-linear (the default)"
    add("--target-modules", nargs="+", default=[ALL_LINEAR], metavar="NAME", help=targets)
    number("--r --rank", common.positive_int, 8, "rank")
    number("--alpha", common.positive, 16.0, "the update is scaled by alpha / r")
    number("--dropout", common.number(float, "a rate in [0, 1)", lambda p: 0 <= p < 1), 0.1, "dropout rate before A")

    add = parser.add_argument_group("training").add_argument
    number("--steps", common.positive_int, 200, "optimizer steps")
    number("--batch-size", common.positive_int, 8, "sequences per step")
    number("--seq-len", common.at_least(2), 128, "tokens per sequence")
    number("--lr", common.positive, 1e-2, "peak learning rate")
    number("--seed", common.number(int, "an integer in [0, 2**63)", lambda n: 0 <= n < 2**63), 0, "of weights, batches, masks")
    checks = "check every layer against float64, and bound the distance of the loss curves by a third run, the control"
    add("--check", action=argparse.BooleanOptionalAction, default=True, help=checks)

    add = parser.add_argument_group("machine").add_argument
    for flag, text in (("--dtype", "of the frozen model"), ("--adapter-dtype", "of A and B")):
        add(flag, choices=("float32", "bfloat16"), default="float32", help=f"{text} (default: %(default)s)")
    add("--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", choices=BACKENDS, help="of the fused linears (default: triton on a GPU, torch on a CPU)")
    add("--threads", type=common.positive_int, metavar="N", help="CPU threads (default: 1 for the small model, else torch's)")

    add = parser.add_argument_group("the small model, built without --model").add_argument
    width = common.number(int, "a multiple of 32, the size of a head", lambda n: n > 0 and n % 32 == 0)
    number("--hidden-size", width, 128, "width")
    number("--layers", common.positive_int, 2, "depth")
    number("--pretrain-steps", common.at_least(0), 600, "steps of pretraining")
    number("--pretrain-lr", common.positive, 2e-3, "peak learning rate of pretraining")


def run(args: argparse.Namespace) -> int:
    """Run the job; 0 when every verdict is positive, 1 when one is not, 2 when the arguments do not fit."""
    for module in ("matplotlib", "rich", "safetensors", "transformers"):
        common.require(module)
    from fastlora.finetune import report, train

    args.target_modules = _targets(args.target_modules)
    backends = available_backends(args.device)
    args.backend = args.backend or backends[0]
    try:
        if args.adapter_dtype not in ("float32", args.dtype):
            raise ValueError(f"--adapter-dtype: got {args.adapter_dtype!r}, expected float32 unless --dtype is the same")
        if args.backend not in backends:
            raise ValueError(f"--backend: got {args.backend!r}, expected {' or '.join(backends)} on {args.device}")
        prepared = train.prepare(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return common.refuse("finetune", str(error))
    result = train.run(args, *prepared)
    (args.output / "report.json").write_text(common.to_json(result) + "\n", encoding="utf-8")
    report.plot(result, args.output / "loss.png")
    print(common.to_json(result)) if args.json else report.show(result)
    return 0 if result["passed"] else 1


def _targets(values: list[str]) -> str | tuple[str, ...]:
    """Several values are names.  A single value is a name, or a pattern if it has other characters, such as all-linear."""
    return tuple(values) if len(values) > 1 or re.fullmatch(r"[\w.]+", values[0]) else values[0]
