"""`longpatch COMMAND ...`: the command line. Each command is one module of this package."""

import argparse
import sys

from ..errors import LongpatchError
from .command import add_commands

COMMANDS = {
    "demo": "see on real text what conversion does",
    "chat": "talk with a model for as long as you like",
    "generate": "continue a text of any length",
    "synthesize": "make question data from long texts",
    "tokenize": "turn texts into a file of token ids",
    "inspect-data": "look at rows as the model will see them",
    "train": "teach a model to read further: QLoRA with stretched positions",
    "merge": "add a trained adapter to its model",
    "eval": "measure a model: perplexity, passkey, ...",
    "lm-eval": "lm-evaluation-harness with converted models",
    "report": "tables, plots and comparisons of recorded results",
}


def build_parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longpatch", description="Text of any length with any causal language model.")
    add_commands(parser, COMMANDS, __name__, arguments, "COMMAND")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 and one line on stderr for anything the user can mend; 130 where Ctrl-C ended it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser(arguments).parse_args(arguments)
    try:
        parsed.run(parsed)
    except LongpatchError as error:
        print(f"{parsed.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parsed.prog}: stopped", file=sys.stderr)
        return 130
    return 0
