"""Look at the rows of a training configuration as the model will see them: what is trained stands ⟦in brackets⟧.

Prints what became of each source and draws how long its documents are; of a stream (data.streaming) it reads the rows
that it shows and no further, and draws nothing.
"""

import sys
from argparse import ArgumentParser, Namespace
from itertools import islice
from pathlib import Path

import numpy as np

from .flags import positive

EXAMPLES = """\
examples:
  longpatch inspect-data examples/recipes/cpu-demo.yaml --set data.train=BOOKS_FOLDER
  longpatch inspect-data CONFIG.yaml --rows 10 --plot lengths.png --validation
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="change an entry")
    parser.add_argument(
        "--rows", type=positive, default=3, metavar="N", help="rows to show, spread evenly (default: 3)"
    )
    parser.add_argument("--validation", action="store_true", help="data.validation instead of data.train")
    parser.add_argument("--plot", type=Path, default=Path("lengths.png"), metavar="PNG")


def run(arguments: Namespace) -> None:
    from ..data import Rows, load_rows
    from ..data.counts import table
    from ..data.inspect import COLOURS, MARKS, draw_lengths, marked
    from ..errors import LongpatchError
    from ..finetune.config import read_config
    from ..models import load_tokenizer

    config = read_config(arguments.config, arguments.set)
    data = config.data
    paths = data.validation if arguments.validation else data.train
    if paths is None:
        raise LongpatchError("inspect-data", ["the configuration has no data.validation"])
    tokenizer = load_tokenizer(config.model.name)
    rows = load_rows(paths, data, tokenizer, streaming=data.streaming and not arguments.validation)
    if isinstance(rows, Rows):
        numbers = sorted({i * len(rows) // arguments.rows for i in range(arguments.rows)})
        shown, total = ((number, rows[number]) for number in numbers), f" of {len(rows):,}"
    else:
        shown, total = enumerate(islice(rows, arguments.rows)), ""
    marks = COLOURS if sys.stdout.isatty() else MARKS
    for number, row in shown:
        trained = int((row["labels"] >= 0).sum())
        print(f"--- row {number}{total}: {len(row['input_ids']):,} tokens, {trained:,} trained")
        print(marked(row, tokenizer, marks))
    if not isinstance(rows, Rows):
        print(table(rows.counts))
        return
    lengths = rows.lengths if len(rows.lengths) else np.array([len(rows.tokens)])
    draw_lengths(arguments.plot, lengths, data.length)
    if rows.counts:
        print(table(rows.counts))
    quarters = ", ".join(f"{value:,.0f}" for value in np.percentile(lengths, (0, 25, 50, 75, 100)))
    print(f"tokens of a document, least to most by quarters: {quarters}; drawn in {arguments.plot}")
