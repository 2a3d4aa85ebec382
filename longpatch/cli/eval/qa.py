"""Questions about long texts: F1 of words and exact match, the best over the reference answers.

ROWS hold "context", "question" and "answers", one JSON object a line. --prompt is one of the built-in ones, or a text
of your own with {context} and {question}.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...errors import LongpatchError
from ...evaluation.documents import read_rows
from ...evaluation.prompts import ARMS, Answerer, chat_template
from ...evaluation.qa import PROMPTS, STOP, QuestionAnswering, qa_samples
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
  longpatch eval qa MODEL qasper.jsonl --baseline original,truncate:4096,constant:unanswerable
  longpatch eval qa smollm2 rows.jsonl --prompt plain --context-tokens 31500 --stop "\\n"
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="JSON lines")
    parser.add_argument("--prompt", default="qasper", metavar="NAME|TEXT", help=f"{', '.join(PROMPTS)}, or your own")
    parser.add_argument("--context-tokens", type=positive, metavar="N", help="cut the middle out of longer contexts")
    parser.add_argument("--new-tokens", type=positive, default=30, metavar="N", help="of an answer (default: 30)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    prompt = str(PROMPTS.get(arguments.prompt, arguments.prompt))
    missing = [part for part in ("{context}", "{question}") if part not in prompt]
    if missing:
        raise LongpatchError("--prompt", [f"has no {part}" for part in missing], ", ".join(PROMPTS))
    samples = qa_samples(read_rows(arguments.rows))[: arguments.limit]
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval qa")
    template = chat_template(tokenizer, arguments.chat_template)
    stop = (*STOP, *(text.replace("\\n", "\n") for text in arguments.stop))
    answerer = Answerer(model, tokenizer, template, arguments.new_tokens, stop)
    evaluation = QuestionAnswering(answerer, arguments.prompt, arguments.context_tokens)
    settings = {"prompt": arguments.prompt, "context_tokens": arguments.context_tokens}
    run = open_run(arguments, "eval qa", **settings, chat_template=arguments.chat_template)
    show(run, run.records(model, arms, samples, evaluation.measure), arguments)
