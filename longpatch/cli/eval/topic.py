"""LongEval: the first topic of a long conversation, or a number that stood in one of many lines.

Conversations and lines are made up, or come from LongEval's own files by --rows. In tables, length counts topics or
lines.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...evaluation.documents import read_rows
from ...evaluation.prompts import ARMS, Answerer, chat_template
from ...evaluation.topic import Topic, line_samples, row_samples, topic_samples
from ..flags import (
    MODEL_HELP,
    add_model_flags,
    add_run_flags,
    add_template_flag,
    numbers,
    open_arms,
    open_model,
    open_run,
    positive,
)
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval topic smollm2 --topics 5,10 --lines 50 --trials 10 --baseline original
  longpatch eval topic MODEL --rows longeval/topics.jsonl --out topics.jsonl
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--topics", type=numbers, default=[], metavar="N,...", help="conversations over N topics")
    parser.add_argument("--lines", type=numbers, default=[], metavar="N,...", help="records of N lines")
    parser.add_argument("--turns", type=positive, default=8, metavar="N", help="exchanges on each topic (default: 8)")
    parser.add_argument("--trials", type=positive, default=10, metavar="N", help="for each N (default: 10)")
    parser.add_argument("--rows", type=Path, metavar="JSONL", help="ask LongEval's prompts")
    parser.add_argument("--new-tokens", type=positive, default=40, metavar="N", help="of an answer (default: 40)")
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    if arguments.rows:
        samples = row_samples(read_rows(arguments.rows))
    else:
        topics = arguments.topics or ([] if arguments.lines else [5])
        samples = topic_samples(topics, arguments.trials, arguments.turns, arguments.seed)
        samples += line_samples(arguments.lines, arguments.trials, arguments.seed)
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval topic")
    template = chat_template(tokenizer, arguments.chat_template)
    evaluation = Topic(Answerer(model, tokenizer, template, arguments.new_tokens))
    run = open_run(arguments, "eval topic", chat_template=arguments.chat_template)
    show(run, run.records(model, arms, samples[: arguments.limit], evaluation.measure), arguments)
