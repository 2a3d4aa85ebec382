"""LM-Infinite's diagnosis: entropy and largest logit of attention by position, and where hidden states lie.

Each text is read in one forward, so --length is bounded by memory. Positions double from 16 unless --positions names
them.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...errors import LongpatchError
from ...evaluation.attention import Attention
from ...evaluation.documents import read_documents
from ...evaluation.reading import document_samples, doubling_edges
from ..flags import MODEL_HELP, add_model_flags, add_run_flags, numbers, open_arms, open_model, open_run, positive
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval attention demo books/ --length 4096 --baseline original --plot diagnosis.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=".txt, .jsonl, uint16 .bin, or folders")
    parser.add_argument("--field", default="text", help="the rows' field that holds the text (default: text)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N documents")
    parser.add_argument("--length", type=positive, default=4096, metavar="N", help="tokens of each (default: 4,096)")
    parser.add_argument("--positions", type=numbers, metavar="N,...", help="which queries to look at")
    parser.add_argument("--by-layer", action="store_true", help="one value for each layer")
    parser.add_argument(
        "--pca-layer", type=int, default=1, metavar="N", help="hidden states after layer N (default: 1)"
    )
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    documents = read_documents(arguments.texts, arguments.field, arguments.start, arguments.limit)
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ("original", "lambda"), "eval attention")
    layers = model.config.num_hidden_layers
    if not 0 <= arguments.pca_layer <= layers:
        raise LongpatchError("eval attention", [f"--pca-layer {arguments.pca_layer}"], f"0 (embeddings) to {layers}")
    samples = document_samples(documents, tokenizer, arguments.length)
    doubled = [edge - 1 for edge in doubling_edges(16, arguments.length + 1)[1:-1]]
    positions = arguments.positions or [0, 1, 2, 4, *doubled]
    evaluation = Attention(model, positions, arguments.by_layer, arguments.pca_layer)
    run = open_run(arguments, "eval attention", tokens=arguments.length)
    show(run, run.records(model, arms, samples, evaluation.measure), arguments)
