"""Does the model use tokens at each distance? Its loss when the context beyond a distance is hidden or shuffled.

A cost above zero says that what lies beyond that distance lowers the loss, in nats a token; it counts as used where the
whole interval is above zero. Of .jsonl rows of conversations, each is a window, and its last answer counts.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ...data.documents import Encoder
from ...data.mixture import parse_parts, read_mixture
from ...errors import LongpatchError
from ...evaluation.distance import ARMS, WAYS, Distance, answer_samples, doubling, window_samples
from ...evaluation.documents import read_documents
from ...report.summary import Row
from ..flags import (
    MODEL_HELP,
    add_model_flags,
    add_run_flags,
    add_template_flag,
    open_arms,
    open_model,
    open_run,
    positive,
)
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval distance demo BOOK.txt --no-convert --length 1024 --baseline 256/4
  longpatch eval distance runs/cpu-demo BOOK.txt --no-convert --length 1024 --plot distance.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="FILE", help="UTF-8 texts, .bin, or .jsonl rows")
    parser.add_argument("--length", type=positive, required=True, metavar="N", help="tokens of a window")
    parser.add_argument("--distances", type=positive, nargs="+", metavar="D", help="default: 16, 32, 64, ...")
    parser.add_argument("--scored", type=positive, default=64, metavar="N", help="last tokens of a window that count")
    parser.add_argument("--windows", type=positive, default=64, metavar="N", help="spread over the texts (default: 64)")
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    room = arguments.length - arguments.scored
    distances = arguments.distances or doubling(arguments.length, arguments.scored)
    if not distances or max(distances) >= room:
        reason = f"--distances up to {max(distances, default=0)} in windows of {arguments.length}"
        raise LongpatchError("eval distance", [reason], f"less than length - scored = {room}")
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval distance")
    share = -(-arguments.windows // len(arguments.texts))
    samples = []
    for path in arguments.texts:
        if path.suffix == ".jsonl":
            documents = map(Encoder(tokenizer, arguments.chat_template), read_mixture(parse_parts(str(path))))
            found = answer_samples(path.name, documents, tokenizer.bos_token_id, max(distances), arguments.length)
            samples += list(found)[:share]
        else:
            documents = read_documents([path])
            for document in documents:
                ids = document.ids(tokenizer)
                ids = ids[int(ids[0] == tokenizer.bos_token_id) :]
                each = -(-share // len(documents))
                samples += window_samples(document.name, ids, arguments.length, arguments.scored, each)
    if not samples:
        raise LongpatchError("eval distance", [f"no text has {arguments.length} tokens"])
    evaluation = Distance(model, distances, tokenizer.bos_token_id, arguments.seed)
    run = open_run(arguments, "eval distance", length=arguments.length, scored=arguments.scored)
    rows = show(run, run.records(model, arms, samples[: arguments.limit], evaluation.measure), arguments)
    for column in dict.fromkeys(column for row in rows for column in row.cells):
        for way in WAYS:
            far = farthest_used(rows, way, column)
            print(f"{column}, {way}: context beyond {far} tokens still lowers the loss (0: none does)")


def farthest_used(rows: list[Row], way: str, column: str) -> int:
    """The largest distance whose cost has an interval above zero; 0: none."""
    costs: list[tuple[int, Any]] = [
        (row.settings["distance"], row.cells.get(column))
        for row in rows
        if row.metric == "cost" and row.settings["way"] == way
    ]
    return max((distance for distance, cell in costs if cell and cell.low is not None and cell.low > 0), default=0)
