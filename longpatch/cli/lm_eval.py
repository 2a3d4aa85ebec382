"""lm-evaluation-harness with one more model, "longpatch": all arguments are handed on to `lm_eval`.

Its --model_args are pretrained, local_branch, global_branch, limit_distance, convert, attn, recall, rope_method,
rope_factor, rope_theta, peft, truncation (error, left, right, center), max_length, dtype, device_map, load_in_4bit, and
those of lm-eval's own "hf".
"""

import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from importlib.util import find_spec

from ..errors import LongpatchError
from ..evaluation.metrics import EVAL_INSTALL

EXAMPLES = """\
examples:
  longpatch lm-eval --model longpatch --model_args pretrained=demo,local_branch=256,global_branch=4 --tasks mmlu
  longpatch lm-eval ls tasks
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # everything that follows is lm-eval's
    parser.add_argument("arguments", nargs=REMAINDER, metavar="...", help="as for lm_eval")


def run(arguments: Namespace) -> None:
    if find_spec("lm_eval") is None:
        raise LongpatchError("lm-eval", ["needs the package lm-eval"], EVAL_INSTALL)
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from ..evaluation.lm_eval import register

    register()
    before = sys.argv
    sys.argv = ["lm_eval", *arguments.arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
