"""`longpatch COMMAND MODEL ...`: the command line."""

import argparse
import sys
from pathlib import Path

from longpatch_kernels import IMPLEMENTATIONS

from .errors import LongpatchError

MODEL_HELP = "a folder, a hub name, a .gguf file, 'demo' (the small model inside this package) or 'smollm2'"
DEMO_HELP = """\
Read one real text twice, with the model as it is and after convert_model, and compare.

Prints perplexity by position, memory and time per token, and a continuation that starts far past the training length;
writes a plot. Nothing is downloaded unless MODEL is the name of a model on a hub.
"""
DEMO_EXAMPLES = """\
examples:
  longpatch demo                                    the bundled model, about a minute
  longpatch demo --text book.txt --tokens 65536     your own text, further out
  longpatch demo smollm2 --local-branch 2048        a published model, window of 2,048 tokens
"""


def model_arguments() -> argparse.ArgumentParser:
    """Flags that every command which loads a model shares."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model and conversion")
    group.add_argument("--local-branch", type=int, metavar="L", help="window in tokens (default: the training length)")
    group.add_argument("--global-branch", type=int, metavar="G", help="first tokens that stay visible (default: 10)")
    group.add_argument("--limit-distance", type=int, metavar="D", help="distance at which they appear (default: L)")
    group.add_argument("--attn", choices=("auto", *IMPLEMENTATIONS), default="auto", help="attention implementation")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--seed", type=int, default=0)
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longpatch", description="Text of any length with any causal language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="see on real text what conversion does",
        description=DEMO_HELP,
        epilog=DEMO_EXAMPLES,
        parents=[model_arguments()],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)
    demo.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: Python's language reference)"
    )
    demo.add_argument(
        "--tokens", type=positive, metavar="N", help="tokens to read (default: 16,384, or 3 T if that is more)"
    )
    demo.add_argument("--new-tokens", type=positive, default=256, metavar="N", help="tokens to write (default: 256)")
    demo.add_argument(
        "--plot", type=Path, default=Path("longpatch_demo.png"), metavar="PNG", help="where the plot goes"
    )
    demo.add_argument("--out", type=Path, metavar="JSONL", help="also write the figures as JSON lines")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 and one line on stderr for anything the user can mend."""
    parsed = build_parser().parse_args(arguments)
    from .demo import tour

    try:
        tour.run(parsed)
    except LongpatchError as error:
        print(f"longpatch {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
