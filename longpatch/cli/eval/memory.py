"""What reading and writing cost after a text of each length: bytes held, peak memory, time per token.

Times are wall-clock times of this process on this machine; nothing else should run beside it.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...demo.text import read_text
from ...evaluation.documents import Document
from ...evaluation.memory import Memory, memory_samples
from ..flags import MODEL_HELP, add_model_flags, add_run_flags, numbers, open_arms, open_model, open_run, positive
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval memory smollm2 --local-branch 1024 --lengths 1024,4096,16384 --baseline original
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--lengths", type=numbers, required=True, metavar="N,...", help="tokens read")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what is read (default: Python's language reference)")
    parser.add_argument("--chunk", type=positive, default=512, metavar="N", help="tokens per forward (default: 512)")
    parser.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="tokens written (default: 32)")
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    text, name = read_text(arguments.text)
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ("original", "lambda"), "eval memory")
    ids = Document(name, text).ids(tokenizer, max(arguments.lengths))
    evaluation = Memory(model, ids, arguments.chunk, arguments.new_tokens)
    run = open_run(arguments, "eval memory", chunk=arguments.chunk)
    samples = memory_samples(arguments.lengths)[: arguments.limit]
    show(run, run.records(model, arms, samples, evaluation.measure), arguments)
