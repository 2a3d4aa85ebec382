"""Documents translated segment by segment, each prompt holding the pairs before: BLEU, reference perplexity, COMET.

With --temp-lora each document is translated twice: by the model as it is ("base"), and by one with a temporary adapter
that learns each pair once it is scored ("temp-lora").

ROWS are one document a line, or a JSON list of them: {"segments": [{"source": ..., "target": ...}, ...]}. Or they are
GuoFeng's {"contexts": ..., "inference": [{"zh": ..., "en": ...}, ...]}: all rows of such a file are one book, in order.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...evaluation.documents import read_rows
from ...evaluation.generation import corpus_bleu
from ...evaluation.metrics import need
from ...evaluation.prompts import ARMS, Answerer, chat_template
from ...evaluation.translation import Translation, Translator, segment_samples
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
from .temp_lora import add_learning_flags, learn_options

EXAMPLES = """\
examples:
  longpatch eval translation MODEL guofeng.json --context k1 --baseline original
  longpatch eval translation MODEL guofeng.json --temp-lora --learning-rate 2e-4 --out guofeng.jsonl
  longpatch eval translation MODEL rows.jsonl --languages German,English --comet Unbabel/wmt22-comet-da
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="documents of segments, JSON or JSON lines")
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="pairs shown before each (default: as many as --context holds, else 3)"
    )
    parser.add_argument(
        "--context", default="k3", metavar="NAME", help="GuoFeng's pairs before the book: k1, k3 (default)"
    )
    parser.add_argument(
        "--own-pairs", action="store_true", help="show the model's own translations, not the references"
    )
    parser.add_argument("--languages", default="Chinese,English", metavar="FROM,TO", help="their names in the prompt")
    parser.add_argument("--bleu-language", default="en", metavar="CODE", help="sacrebleu's tokeniser (default: en)")
    parser.add_argument("--comet", metavar="MODEL", help="a COMET model or checkpoint (package unbabel-comet)")
    parser.add_argument("--new-tokens", type=positive, default=200, metavar="N", help="of a segment (default: 200)")
    parser.add_argument("--temp-lora", action="store_true", help="also with an adapter that learns on the way")
    add_learning_flags(parser)
    add_template_flag(parser)
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, truncate:N, constant:TEXT")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    need("BLEU", *(["COMET"] if arguments.comet else []))
    samples = segment_samples(read_rows(arguments.rows), arguments.context)[: arguments.limit]
    model, tokenizer = open_model(arguments)
    arms = open_arms(arguments, model, ARMS, "eval translation")
    template = chat_template(tokenizer, arguments.chat_template)
    answerer = Answerer(model, tokenizer, template, arguments.new_tokens, ("\n",))
    first, _, second = arguments.languages.partition(",")
    settings: dict[str, Any] = {
        "pairs": arguments.pairs,
        "context": arguments.context,
        "chat_template": arguments.chat_template,
    }
    translators = {"base": Translator(answerer, arguments.pairs, (first, second), arguments.own_pairs)}
    if arguments.temp_lora:
        options = learn_options(arguments)
        translators["temp-lora"] = replace(translators["base"], learn=options)
        settings["learn"] = options.to_dict()
    evaluation = Translation(translators, arguments.bleu_language, arguments.comet)
    run = open_run(arguments, "eval translation", **settings)
    records = run.records(model, arms, samples, evaluation.measure)
    show(run, records + corpus_bleu(records, run.group_record, arguments.bleu_language), arguments)
