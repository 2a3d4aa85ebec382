"""A sentence hidden in real text and asked for at the end: ROUGE-L, match, or a judge's mark by length and depth.

--rescore takes saved generations through other metrics, or another judge, without a model; each by the question and the
target that it was asked, unless others are given.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ...endpoint import Endpoint
from ...errors import LongpatchError
from ...evaluation import needle
from ...evaluation.documents import read_texts
from ...evaluation.judge import Judge
from ...evaluation.metrics import need
from ...evaluation.needle import Needle, mark, needle_samples
from ...evaluation.prompts import ARMS, Answerer, chat_template
from ...evaluation.rescore import rescore
from ...evaluation.run import Measurement
from ...families import trained_length
from ...results import read_records
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
  longpatch eval needle smollm2 books/ --local-branch 2048 --lengths 1024,4096 --depths 5 --plot needle.png
  longpatch eval needle MODEL books/ --lengths 4096 --judge http://localhost:8000/v1 --judge-model NAME --out n.jsonl
  longpatch eval needle MODEL --rescore n.jsonl --metrics match --out again.jsonl
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("haystack", type=Path, nargs="*", metavar="TEXT", help="files or folders to hide it in")
    parser.add_argument("--lengths", type=numbers, metavar="N,...", help="prompt tokens (default: the training length)")
    parser.add_argument(
        "--depths", type=fractions, default=fractions("5"), metavar="N|F,...", help="how many, or which"
    )
    parser.add_argument("--trials", type=positive, default=1, metavar="N", help="for each cell (default: 1)")
    parser.add_argument("--needle", default=needle.NEEDLE, metavar="TEXT", help="what is hidden")
    parser.add_argument("--question", metavar="TEXT", help="what is asked")
    parser.add_argument("--target", metavar="TEXT", help="the right answer")
    parser.add_argument("--new-tokens", type=positive, default=50, metavar="N", help="of an answer (default: 50)")
    parser.add_argument("--metrics", nargs="+", choices=needle.METRICS, default=list(needle.METRICS))
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible endpoint that marks answers")
    parser.add_argument("--judge-model", default="default", metavar="NAME")
    parser.add_argument("--judge-key", metavar="KEY", help="bearer token of the endpoint")
    parser.add_argument("--rescore", type=Path, metavar="JSONL", help="score these records' answers anew")
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    need(*(["ROUGE"] if "rouge" in arguments.metrics else []))
    judge = None
    if arguments.judge:
        judge = Judge(Endpoint(arguments.judge, arguments.judge_model, arguments.judge_key))
    usual = {"question": needle.QUESTION, "target": needle.ANSWER}
    given = {name: getattr(arguments, name) for name in usual if getattr(arguments, name) is not None}
    if arguments.rescore:
        run, saved = open_run(arguments, "eval needle"), read_records(arguments.rescore)

        def score(said: dict[str, Any]) -> list[Measurement]:
            return mark(usual | said | given, arguments.metrics, judge)

        show(run, rescore(run, saved, score, arguments.limit), arguments)
        return
    asked = usual | given
    if not arguments.haystack:
        raise LongpatchError("eval needle", ["no text to hide the needle in"], "files or folders after MODEL")
    text = "\n\n".join(read_texts(arguments.haystack))
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval needle")
    template = chat_template(tokenizer, arguments.chat_template)
    answerer = Answerer(model, tokenizer, template, arguments.new_tokens)
    options = {"metrics": arguments.metrics, "judge": judge, "needle": arguments.needle, **asked}
    evaluation = Needle.create(answerer, text, **options)
    lengths = arguments.lengths or [trained_length(model.config)]
    texts = (text, arguments.needle, asked["question"])
    samples = needle_samples(lengths, arguments.depths, arguments.trials, arguments.seed, texts)[: arguments.limit]
    run = open_run(arguments, "eval needle", chat_template=arguments.chat_template)
    show(run, run.records(model, arms, samples, evaluation.measure), arguments)
