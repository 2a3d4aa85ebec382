"""Real text continued at chosen positions and compared with how it really goes on: BLEU and ROUGE."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...evaluation.documents import read_documents
from ...evaluation.generation import Generation, corpus_bleu, generation_samples
from ...evaluation.metrics import need
from ...evaluation.prompts import ARMS, Answerer, Template
from ..flags import MODEL_HELP, add_model_flags, add_run_flags, numbers, open_arms, open_model, open_run, positive
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval generation demo books/ --positions 256,1024,4096 --new-tokens 100 --baseline original
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=".txt, .jsonl, uint16 .bin, or folders")
    parser.add_argument("--field", default="text", help="the rows' field that holds the text (default: text)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N documents")
    parser.add_argument("--positions", type=numbers, required=True, metavar="N,...", help="tokens read before writing")
    parser.add_argument("--new-tokens", type=positive, default=100, metavar="N", help="tokens to write (default: 100)")
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    need("BLEU", "ROUGE")
    documents = read_documents(arguments.texts, arguments.field, arguments.start)
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval generation")
    samples = generation_samples(documents, tokenizer, arguments.positions, arguments.new_tokens)[: arguments.limit]
    evaluation = Generation(Answerer(model, tokenizer, Template(), arguments.new_tokens))
    run = open_run(arguments, "eval generation", new_tokens=arguments.new_tokens)
    records = run.records(model, arms, samples, evaluation.measure)
    show(run, records + corpus_bleu(records, run.group_record), arguments)
