"""Break the result of `dvc repro` on purpose: the labs of LABS.md that need a command of their own.

    capas lab template      ask the tuned model in the chat format of each family
    capas lab end-token     train twice, with the end token in the loss and without it; then ask
    capas lab attention     compute attention as eager and as sdpa do; compare logits, answers and seconds

Nothing that git or DVC tracks changes. The models that end-token trains stay in .dvc/tmp/lab/ until the next
time.

Exit code: 0 done, 2 it cannot be done (the reason is printed).
"""

import argparse
import sys
from pathlib import Path

from capas.core.language import Language
from capas.use import tuned_model

LABS = ("template", "end-token", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    counts = tuned_model.bounded(int, 1, sys.maxsize)
    parser.add_argument("lab", choices=LABS, metavar="LAB", help=", ".join(LABS))
    parser.add_argument(
        "--records",
        type=counts,
        default=100,
        metavar="N",
        help="N records of the test split (default: 100)",
    )
    parser.add_argument(
        "--language",
        choices=("en", "es"),
        default="en",
        help="language of the output (default: en)",
    )


def command(options: argparse.Namespace) -> int:
    from capas.use.lab import attention, end_token, template

    labs = {"template": template.run, "end-token": end_token.run, "attention": attention.run}
    language = Language(Path(__file__).parent, options.language, {})
    for line in labs[options.lab](Path.cwd(), options.records, language):
        sys.stdout.write(f"{line}\n")
    return 0
