"""Plant key-value, multi-hop and counting questions in real text, at controlled distances. No endpoint is needed.

Each row is a conversation {messages} with the text and its first question, then the other questions; "kinds" and
"distances" (tokens from the farthest sentence a question needs to the end of the text) say what is in it.
"""

from argparse import ArgumentParser, Namespace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ...data.documents import Encoder
from ...models import load_tokenizer
from ...synthesis.files import read_texts, write_rows
from ...synthesis.plant import Planting, planted_rows
from ...synthesis.puzzles import KINDS
from ..flags import MODEL_HELP, TEMPLATE_HELP, numbers, positive

EXAMPLES = """\
examples:
  longpatch synthesize offline demo BOOKS rows.jsonl --length 1024 --rows 2000 --questions 4
  longpatch synthesize offline smollm2 BOOKS far.jsonl --length 8192 --rows 500 --distances 4096,8000 --kinds multi-hop
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"whose tokens are counted: {MODEL_HELP}")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help=".txt files, {text} rows or folders")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--rows", type=positive, required=True, metavar="N")
    parser.add_argument("--length", type=positive, required=True, metavar="TOKENS", help="of a row, at most")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KIND,...", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--questions", type=positive, default=1, metavar="N", help="of a row (default: 1)")
    parser.add_argument("--distances", type=numbers, default=[], metavar="N,...", help="default: 32, 64, 128, ...")
    parser.add_argument("--template", default="auto", metavar="NAME|FILE", help=TEMPLATE_HELP)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: Namespace) -> None:
    planting = Planting(
        arguments.length,
        tuple(arguments.kinds.split(",")),
        arguments.questions,
        tuple(arguments.distances),
        arguments.seed,
    )
    texts = list(read_texts(arguments.texts).values())
    encoder = Encoder(load_tokenizer(arguments.model), arguments.template)
    rows = islice(planted_rows(texts, encoder, planting), arguments.rows)
    write_rows(arguments.out, tqdm(rows, total=arguments.rows, unit="row", mininterval=5))
    print(f"{arguments.rows} rows in {arguments.out}")
