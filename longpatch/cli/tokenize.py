"""Turn texts into one file of token ids, which training and evaluations read by memory map.

OUT.bin holds uint16 or uint32 numbers, OUT.json beside it what they are. Texts are .txt files, .jsonl rows {text},
folders of them, or PATH[N] for N rows at random.
"""

import os
from argparse import ArgumentParser, Namespace

from ..data.counts import table
from ..data.tokenize import tokenize
from ..models import load_tokenizer
from .flags import MODEL_HELP, positive

EXAMPLES = """\
examples:
  longpatch tokenize demo BOOKS books.bin
  longpatch tokenize meta-llama/Llama-2-7b-hf c4.jsonl[20000] BOOKS pretrain.bin --workers 16
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"whose tokenizer: {MODEL_HELP}")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("out", metavar="OUT.bin")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that PATH[N] chooses")


def run(arguments: Namespace) -> None:
    tokenizer = load_tokenizer(arguments.model)
    counts = tokenize(tokenizer, arguments.texts, arguments.out, arguments.workers, arguments.seed, progress=True)
    print(table(counts))
