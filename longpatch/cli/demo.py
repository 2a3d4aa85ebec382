"""Read one real text twice, with the model as it is and after convert_model, and compare.

Prints perplexity by position, memory and time per token, and a continuation that starts far past the training length;
writes a plot. The text must be longer than the window, which is the training length unless --local-branch makes it
smaller; a text that ends before the training length shows what the window costs. The first line says how long all of it
will take, and --tokens bounds that. Nothing is downloaded unless MODEL is the name of a model on a hub.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from transformers.utils import logging

from ..demo import tour
from ..demo.text import read_text
from .flags import MODEL_HELP, add_model_flags, conversion_settings, open_model, positive

EXAMPLES = """\
examples:
  longpatch demo                                    the bundled model, about a minute
  longpatch demo --text book.txt --tokens 65536     your own text, further out
  longpatch demo smollm2 --local-branch 2048        a published model, window of 2,048 tokens
  longpatch demo models/my-llama --dtype bfloat16   a model in a folder
  longpatch demo models/my-llama.Q8_0.gguf          a model in a .gguf file
  longpatch demo HuggingFaceTB/SmolLM2-360M         a model on the hub, downloaded once
  longpatch demo models/llama-3.1 --local-branch 4096 --tokens 8192    past a window, before the training length
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: Python's language reference)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens to read (default: 16,384, or three times the training length if that is more)",
    )
    parser.add_argument("--new-tokens", type=positive, default=256, metavar="N", help="tokens to write (default: 256)")
    parser.add_argument(
        "--plot", type=Path, default=Path("longpatch_demo.png"), metavar="PNG", help="where the plot goes"
    )
    parser.add_argument("--out", type=Path, metavar="JSONL", help="also write the figures as JSON lines")
    add_model_flags(parser, may_stay=False)


def run(arguments: Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text, text_name = read_text(arguments.text)
    model, tokenizer = open_model(arguments)
    tour.run(arguments, text, text_name, model, tokenizer, conversion_settings(arguments))
