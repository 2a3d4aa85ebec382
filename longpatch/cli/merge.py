"""Add an adapter to the model that it was trained on, and save the result as a model of its own.

The sum is taken over BASE's stored, unquantised weights in float32 and saved in their dtype; stretched positions are
kept in config.json. Prints how far the saved model is from BASE + ADAPTER, unquantised and as it was trained.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .flags import MODEL_HELP

EXAMPLES = """\
examples:
  longpatch merge demo runs/cpu-demo merged
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=MODEL_HELP)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder that `longpatch train` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--no-gap", action="store_true", help="do not load the quantised model for comparison")


def run(arguments: Namespace) -> None:
    from ..finetune.merge import merge

    for gap in merge(arguments.base, arguments.adapter, arguments.out, not arguments.no_gap):
        print(gap)
