"""How well a model reads: perplexity by position, in sliding windows, or streamed to any length.

Every document is read whole (or its first --length tokens) with one kept cache, so that a converted model's memory
stays constant; --repeat reads it over and over as one text, --join reads all documents as one. Arms: original, L/G,
fresh:W (the text cut into windows of W tokens that know nothing of each other) and truncate:N (windows of N tokens that
move by N/2 and score what is new, so that each token has N/2 to N before it). --sliding-window N is the same for every
arm, with windows and steps of any size.
"""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from ...errors import LongpatchError
from ...evaluation.documents import read_documents
from ...evaluation.reading import (
    ARMS,
    Reading,
    document_samples,
    doubling_edges,
    measure_positions,
    measure_sliding,
)
from ...evaluation.run import Sample, Work
from ...families import trained_length
from ..flags import MODEL_HELP, add_model_flags, add_run_flags, open_arms, open_model, open_run, positive
from ..show import add_plot_flag, show

EXAMPLES = """\
examples:
  longpatch eval perplexity demo books/ --baseline fresh:256,256/0,original --length 4096
  longpatch eval perplexity smollm2 book.txt --local-branch 2048 --length 24576 --baseline fresh:8192,original
  longpatch eval perplexity demo book.txt --repeat 10 --bucket 100000 --out stream.jsonl --resume
  longpatch eval perplexity MODEL books/ --join --bucket 1000000 --out stream.jsonl     however long they are
  longpatch eval perplexity MODEL books/ --length 4096 --bucket 1 --smooth 64 --plot positions.png
  longpatch eval perplexity MODEL tokens.bin --seq-len 8192 --sliding-window 256 --context-size 8192 --no-convert
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=".txt, .jsonl, uint16 .bin, or folders")
    parser.add_argument("--field", default="text", help="the rows' field that holds the text (default: text)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N documents")
    parser.add_argument("--length", type=positive, metavar="N", help="read the first N tokens of each (default: all)")
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="read each text N times over as one")
    parser.add_argument("--join", action="store_true", help="read all documents as one text")
    parser.add_argument("--chunk", type=positive, metavar="N", help="tokens per forward (default: 512)")
    parser.add_argument(
        "--bucket",
        type=positive,
        metavar="N",
        help="spans of N positions; 1 is every position (default: spans that double from the training length)",
    )
    parser.add_argument(
        "--save-every", type=positive, default=1_000_000, metavar="N", help="tokens between states kept for --resume"
    )
    sliding = parser.add_argument_group("sliding windows")
    sliding.add_argument("--sliding-window", type=positive, metavar="N", help="tokens from window to window")
    sliding.add_argument("--seq-len", type=positive, metavar="N", help="tokens of a window (default: training length)")
    sliding.add_argument("--context-size", type=positive, metavar="N", help="cut windows into parts of N tokens")
    sliding.add_argument(
        "--score", choices=("new", "all"), help="tokens no earlier window scored (default), or all of each window"
    )
    add_model_flags(parser)
    add_run_flags(parser, "original, L/G, fresh:W, truncate:N")
    add_plot_flag(parser)


def run(arguments: Namespace) -> None:
    sliding = arguments.sliding_window is not None
    ignored = ("chunk", "bucket") if sliding else ("seq_len", "context_size", "score")
    given = [f"--{name.replace('_', '-')}" for name in ignored if getattr(arguments, name) is not None]
    if given:
        reason = f"{', '.join(given)} {'with' if sliding else 'without'} --sliding-window"
        raise LongpatchError("eval perplexity", [reason], "--seq-len, --context-size and --score belong to it")
    documents = read_documents(arguments.texts, arguments.field, arguments.start, arguments.limit)
    model, tokenizer = open_model(arguments)
    samples = document_samples(documents, tokenizer, arguments.length, arguments.repeat, arguments.join)
    if sliding:
        _run_sliding(arguments, model, samples)
        return
    arms = open_arms(arguments, model, ARMS, "eval perplexity")
    longest = max(sample.size for sample in samples)
    if arguments.bucket:
        edges = tuple(range(0, longest + arguments.bucket, arguments.bucket))
    else:
        edges = doubling_edges(trained_length(model.config), longest)
    reading = Reading(edges, arguments.chunk or 512, arguments.save_every)
    settings = {"tokens": arguments.length} if arguments.length else {}
    if arguments.repeat > 1:
        settings["repeat"] = arguments.repeat
    run = open_run(arguments, "eval perplexity", **settings)
    show(run, run.records(model, arms, samples, partial(measure_positions, model, tokenizer, reading)), arguments)


def _run_sliding(arguments: Namespace, model, samples: list[Sample]) -> None:
    arms = open_arms(arguments, model, ("original", "lambda"), "eval perplexity --sliding-window")
    length, stride = arguments.seq_len or trained_length(model.config), arguments.sliding_window
    context, score = arguments.context_size or length, arguments.score or "new"
    if stride > length:
        reason = f"--sliding-window {stride} leaves tokens out between windows of {length}"
        raise LongpatchError("eval perplexity", [reason], f"at most --seq-len, {length}")
    settings = {"seq_len": length, "sliding_window": stride, "score": score}
    run = open_run(arguments, "eval perplexity", **settings, context_size=context)

    def measure(arm, sample: Sample, work: Work):
        return measure_sliding(model, length, stride, context, score == "new", sample, work)

    show(run, run.records(model, arms, samples, measure), arguments)
