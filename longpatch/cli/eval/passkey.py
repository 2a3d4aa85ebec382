"""A number hidden in text and asked for at the end: exact and fuzzy score by length and depth.

The text is the usual repeated sentences, or --text. --rows takes prompts from a file instead ("input" and "target", one
JSON object a line), --write-rows writes those that would be asked and stops.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...evaluation.documents import read_rows, read_texts
from ...evaluation.passkey import WORDINGS, PassKey, passkey_samples, row_samples
from ...evaluation.prompts import ARMS, Answerer, chat_template
from ...families import trained_length
from ..flags import (
    MODEL_HELP,
    add_model_flags,
    add_run_flags,
    add_template_flag,
    fractions,
    numbers,
    open_arms,
    open_model,
    open_run,
    positive,
)
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval passkey demo --text book.txt --lengths 128,256,1024 --depths 5 --baseline original,truncate:256
  longpatch eval passkey MODEL --wording lm-infinite --lengths 8192 --placement random --trials 100 --digits 7
  longpatch eval passkey smollm2 --local-branch 1024 --lengths 1024,4096 --out passkey.jsonl --plot passkey.png
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--lengths", type=numbers, metavar="N,...", help="prompt tokens (default: the training length)")
    parser.add_argument(
        "--depths", type=fractions, default=fractions("5"), metavar="N|F,...", help="how many, or which"
    )
    parser.add_argument("--trials", type=positive, default=4, metavar="N", help="keys for each cell (default: 4)")
    parser.add_argument("--placement", choices=("grid", "random", "first-half"), default="grid")
    parser.add_argument("--digits", type=positive, default=5, metavar="N", help="of the key (default: 5)")
    parser.add_argument(
        "--new-tokens", type=positive, metavar="N", help="of an answer (default: enough for the key; 50 in wording 80k)"
    )
    parser.add_argument("--wording", choices=tuple(WORDINGS), default="plain")
    parser.add_argument("--text", type=Path, metavar="TEXT", help="hide it in this text")
    parser.add_argument("--rows", type=Path, metavar="JSONL", help="ask these prompts")
    parser.add_argument("--write-rows", type=Path, metavar="JSONL", help="write the prompts and stop")
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    text = read_texts([arguments.text])[0] if arguments.text else None
    given = read_rows(arguments.rows) if arguments.rows else None
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval passkey")
    template = chat_template(tokenizer, arguments.chat_template)
    if given is not None:
        samples = row_samples(given)
    else:
        lengths = arguments.lengths or [trained_length(model.config)]
        placed = (arguments.depths, arguments.trials, arguments.digits, arguments.placement, arguments.seed)
        samples = passkey_samples(lengths, *placed, text)
    samples = samples[: arguments.limit]
    digits = max(len(sample.content["key"]) for sample in samples)
    wording = WORDINGS[arguments.wording]
    room = 3 * digits + 8 if wording.answer_start else max(50, 3 * digits + 8)
    answerer = Answerer(model, tokenizer, template, arguments.new_tokens or room)
    evaluation = PassKey.create(answerer, wording, text)
    if arguments.write_rows:
        rows = [json.dumps(evaluation.row(sample)) for sample in samples]
        arguments.write_rows.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return
    settings = {"wording": arguments.wording, "placement": arguments.placement, "digits": digits}
    run = open_run(arguments, "eval passkey", **settings, chat_template=arguments.chat_template)
    show(run, run.records(model, arms, samples, evaluation.measure), arguments)
