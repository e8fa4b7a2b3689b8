"""`fastlora finetune`: adapt a causal language model with fused LoRA linears, and prove the swap against eager ones."""

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastlora.cli import common, progress
from fastlora.finetune.settings import DTYPES, Settings
from fastlora.functional import BACKENDS
from fastlora.injection.matching import ALL_LINEAR

DESCRIPTION = """\
Adapt a causal language model to text with LoRA, twice side by side: with eager
LoRA linears and with FusedLoraLinear, from the same weights, on the same
batches, with the same dropout masks. Compare loss, time and memory, and check
every layer against float64.

Without --model a small byte-level Llama is built and pretrained first, on the
chapters of the Python language reference; without --text it is adapted to the
reference's pages on built-in types, format strings and pdb. This takes one to
two minutes on one CPU core and downloads nothing."""

EPILOG = """\
examples:
  fastlora finetune
  fastlora finetune --steps 300 --r 16 --dropout 0.05
  fastlora finetune --model ./my-llama --text notes/ book.txt --dtype bfloat16

exit code: 0 all verdicts are positive, 1 one is not, 2 wrong arguments."""


def register(subparsers: Any) -> None:
    """Add the subcommand to the parser of `fastlora`."""
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a language model with fused and with eager LoRA, and compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the main job; 0 when every verdict is positive, 1 when not, 2 when the arguments do not fit."""
    for module, extra in (("matplotlib", "cli"), ("rich", "cli"), ("safetensors", "hf"), ("transformers", "hf")):
        common.require(module, extra)
    from fastlora.finetune import job, report, show

    try:
        settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
        prepared = job.prepare(settings)
    except (ValueError, TypeError, OSError) as error:
        return common.refuse("finetune", str(error))
    with progress.choose(args.json) as hears:
        result = job.run(prepared, hears)
    (settings.output / "report.json").write_text(report.to_json(result) + "\n", encoding="utf-8")
    show.plot(result, settings.output / "loss.png")
    if args.json:
        print(report.to_json(result))
    else:
        show.print_table(result, common.consoles()[0])
    return 0 if result.passed else 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model, text, results").add_argument
    add("--model", type=Path, metavar="FOLDER", help="local Hugging Face model; its tokenizer is used where it has one")
    add("--text", type=Path, nargs="+", default=(), metavar="PATH", help="text to adapt to: files, or folders of .txt .md .rst")
    add("--output", type=Path, default=Settings.output, metavar="FOLDER", help="where the results go (default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON to standard output, and nothing else")

    add = parser.add_argument_group("LoRA").add_argument
    add(
        "--target-modules", nargs="+", default=Settings.target_modules, metavar="NAME", action=_Targets,
        help="linears to adapt: names or ends of names, a regular expression for the full name, or all-linear (the default)",
    )  # fmt: skip
    add("--r", "--rank", dest="r", type=int, default=Settings.r, metavar="N", help="rank (default: %(default)s)")
    add("--alpha", type=float, default=Settings.alpha, help="the scale of the update is alpha / r (default: %(default)s)")
    add("--dropout", type=float, default=Settings.dropout, metavar="P", help="dropout rate before A (default: %(default)s)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=Settings.steps, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=int, default=Settings.batch_size, metavar="N", help="sequences per step (default: %(default)s)")
    add("--seq-len", type=int, default=Settings.seq_len, metavar="N", help="tokens per sequence (default: %(default)s)")
    add("--lr", type=float, default=Settings.lr, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=Settings.seed, metavar="N", help="of weights, batches and masks (default: %(default)s)")
    add(
        "--check", action=argparse.BooleanOptionalAction, default=Settings.check,
        help="compare every layer with float64, and bound the distance of the curves by a third, control run",
    )  # fmt: skip

    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=list(DTYPES), default=Settings.dtype, help="of the frozen model (default: %(default)s)")
    add("--adapter-dtype", choices=list(DTYPES), help="of A and B (default: float32)")
    add("--device", type=common.device, default=common.default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", choices=BACKENDS, help="of the fused linears (default: triton on a GPU, torch on a CPU)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: 1 for the small model, else torch's)")

    add = parser.add_argument_group("the small model built without --model").add_argument
    add("--hidden-size", type=int, default=Settings.hidden_size, metavar="N", help="width (default: %(default)s)")
    add("--layers", type=int, default=Settings.layers, metavar="N", help="depth (default: %(default)s)")
    add(
        "--pretrain-steps", type=int, default=Settings.pretrain_steps, metavar="N",
        help="steps of pretraining (default: %(default)s)",
    )  # fmt: skip
    add(
        "--pretrain-lr", type=float, default=Settings.pretrain_lr, metavar="LR",
        help="its peak learning rate (default: %(default)s)",
    )  # fmt: skip


class _Targets(argparse.Action):
    """Names become a tuple; all-linear, or one value that is no name, stays a string: a regular expression."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        alone = values[0] if len(values) == 1 else None
        is_string = alone is not None and (alone == ALL_LINEAR or re.fullmatch(r"[\w.]+", alone) is None)
        setattr(namespace, self.dest, alone if is_string else tuple(values))
