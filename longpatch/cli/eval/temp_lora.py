"""Temp-LoRA (arXiv 2401.11504): perplexity of documents with a temporary adapter that learns as it reads, and without.

Both read the same text in one pass; every token is scored before any update that saw it. The base reads through the
same attention with a cache that is never reset. Perplexity is exp(mean NLL); the last columns are the mean of chunk
perplexities, which Temp-LoRA's own code reports.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from ...errors import LongpatchError
from ...evaluation.buckets import Bucket, by_length, by_position
from ...evaluation.documents import read_documents
from ...evaluation.run import process_state
from ...evaluation.temp_lora import BASE, Walk, walk_document
from ...results import record, write_records
from ...temp_lora.options import LearnOptions
from ..flags import MODEL_HELP, add_model_flags, loading_settings, open_converted, positive

EXAMPLES = """\
examples:
  longpatch eval temp-lora demo book.txt --local-branch 256 --global-branch 4 --chunk-tokens 512 --context-tokens 256
  longpatch eval temp-lora smollm2 *.txt --local-branch 2048 --tokens 50000 --resume walk --plot walk.png
  longpatch eval temp-lora MODEL book.txt --inference-context-tokens 3072 31744      both in one walk
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=".txt, .jsonl, .bin, or folders")
    parser.add_argument("--limit", type=positive, metavar="N", help="read the first N texts only")
    parser.add_argument("--tokens", type=positive, metavar="N", help="read the first N tokens only (default: all)")
    add_learning_flags(parser)
    walk = parser.add_argument_group("walk")
    walk.add_argument("--chunk-tokens", type=positive, default=1024, metavar="N")
    walk.add_argument(
        "--context-tokens", type=positive, default=3072, metavar="N", help="to learn with (default: 3072)"
    )
    walk.add_argument(
        "--inference-context-tokens",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="to score with, one or more in one walk (default: as --context-tokens)",
    )
    walk.add_argument(
        "--cache-reuse-chunks", type=int, default=1, metavar="K", help="build the cache anew after (0: never)"
    )
    walk.add_argument(
        "--fresh-base", action="store_true", help="rebuild the base's cache as well, for a model that does not stream"
    )
    report = parser.add_argument_group("report")
    report.add_argument(
        "--bucket-tokens", type=positive, metavar="N", help="size of position buckets (default: a sixth)"
    )
    report.add_argument("--bucket-start", type=int, default=0, metavar="N", help="first position reported")
    report.add_argument("--bucket-end", type=positive, metavar="N", help="position to stop at")
    report.add_argument(
        "--length-buckets",
        type=positive,
        nargs="*",
        default=[100_000, 200_000, 300_000],
        metavar="N",
        help="edges of the document lengths reported (default: 100000 200000 300000)",
    )
    report.add_argument("--resume", type=Path, metavar="DIR", help="keep the state here, and go on from it")
    report.add_argument("--out", type=Path, metavar="JSONL", help="write the figures as JSON lines")
    report.add_argument("--plot", type=Path, metavar="PNG", help="draw perplexity by tokens read")
    add_model_flags(parser)


def add_learning_flags(parser: ArgumentParser) -> None:
    defaults = LearnOptions()
    group = parser.add_argument_group("learning (defaults: those of the paper)")
    group.add_argument("--rank", type=positive, default=defaults.rank)
    group.add_argument("--alpha", type=float, help="default: the rank")
    group.add_argument("--dropout", type=float, default=defaults.dropout)
    group.add_argument("--target-modules", nargs="+", metavar="NAME", help="default: all linear layers but the output")
    group.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    group.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps)
    group.add_argument("--epochs", type=positive, default=defaults.epochs)
    group.add_argument("--trainable", choices=("all", "queries"), default="all")
    group.add_argument("--no-context-grad", action="store_true", help="detach the context while learning")
    group.add_argument("--gradient-checkpointing", action="store_true")


def learn_options(arguments: Namespace) -> LearnOptions:
    return LearnOptions(
        rank=arguments.rank,
        alpha=arguments.rank if arguments.alpha is None else arguments.alpha,
        dropout=arguments.dropout,
        target_modules=None if arguments.target_modules is None else tuple(arguments.target_modules),
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        epochs=arguments.epochs,
        trainable=arguments.trainable,
        context_grad=not arguments.no_context_grad,
        gradient_checkpointing=arguments.gradient_checkpointing,
        seed=arguments.seed,
    )


def run(arguments: Namespace) -> None:
    if not arguments.tp and process_state().num_processes > 1:
        raise LongpatchError("eval temp-lora", ["several processes, of which each would do all of it"], "one process")
    texts = read_documents(arguments.texts, limit=arguments.limit)
    model, tokenizer = open_converted(arguments)
    walk = Walk(
        arguments.chunk_tokens,
        arguments.context_tokens,
        tuple(arguments.inference_context_tokens),
        arguments.cache_reuse_chunks or None,
        learn_options(arguments),
        arguments.fresh_base,
    )
    scores, lines = [], []
    for text in texts:
        ids, name = text.ids(tokenizer)[: arguments.tokens], text.name.removesuffix(".txt")
        if len(ids) < 2:
            raise LongpatchError("eval temp-lora", [f"{text.name} has no token to predict"], "two tokens, BOS included")
        checkpoint = None if arguments.resume is None else arguments.resume / name.replace("/", "_")
        with tqdm(total=len(ids), desc=name, unit="tok", unit_scale=True, mininterval=2) as progress:
            document = None
            for document in walk_document(model, ids, walk, checkpoint):
                progress.update(document.position - progress.n)
        assert document is not None
        scores.append({arm: [torch.cat(chunks)] for arm, chunks in document.nll.items()})
        rechunked = {arm: list(chunks[0].split(walk.chunk_tokens)) for arm, chunks in scores[-1].items()}
        scores[-1] = rechunked
        size = arguments.bucket_tokens or -(-len(ids) // 6)
        own = [
            *by_length([rechunked], []),
            *by_position([rechunked], size, walk.chunk_tokens, arguments.bucket_start, arguments.bucket_end),
        ]
        print(f"\n{text.name}, {len(ids):,} tokens")
        print(_table(own, walk), flush=True)
        print("  ".join(f"{part} {seconds:,.0f} s" for part, seconds in document.seconds.items()))
        lines += [line for found in own for line in _records(arguments, walk, text.name, found)]
        lines += [
            record(
                "eval temp-lora",
                arguments.model,
                "time",
                seconds,
                "s",
                len(ids),
                seed=arguments.seed,
                text=text.name,
                part=part,
            )
            for part, seconds in document.seconds.items()
        ]
    longest = max(sum(map(len, document[walk.bases[0]])) for document in scores)
    size = arguments.bucket_tokens or -(-longest // 6)
    positions = list(by_position(scores, size, walk.chunk_tokens, arguments.bucket_start, arguments.bucket_end))
    if len(scores) > 1:
        name = f"{len(scores)} texts"
        everything = [*by_length(scores, []), *by_length(scores, arguments.length_buckets), *positions]
        print(f"\n{name}")
        print(_table(everything, walk))
        lines += [line for found in everything for line in _records(arguments, walk, name, found)]
    for context in walk.contexts:
        gains = [next(by_length([document], [])).gain(str(context), walk.base(context)) for document in scores]
        average, least = sum(gains) / len(gains), min(gains)
        print(f"\nperplexity below the base, context {context}: {average:.1%} on average, {least:.1%} at least")
    if arguments.out:
        write_records(arguments.out, lines)
    if arguments.plot and positions:
        _draw(arguments.plot, positions, arguments.model)
    elif arguments.plot:
        print(f"\nno plot: no text is longer than --bucket-start {arguments.bucket_start:,}")


def _title(arm: str) -> str:
    return arm if arm.startswith(BASE) else f"context {arm}"


def _table(buckets: list[Bucket], walk: Walk) -> str:
    arms = list(buckets[0].perplexity)
    below = "".join(f"{'below base':>12}" for _ in walk.contexts)
    lines = [f"{'tokens':<34}" + "".join(f"{_title(arm):>15}" for arm in arms) + below + f"{'chunk means':>14}"]
    for found in buckets:
        span = f"{found.by} {found.start:,} to {found.stop:,}"
        values = "".join(f"{found.perplexity[arm]:>15.2f}" for arm in arms)
        gains = "".join(f"{found.gain(str(context), walk.base(context)):>12.1%}" for context in walk.contexts)
        means = " ".join(f"{found.chunk_mean[arm]:.2f}" for arm in arms)
        lines.append(f"{span:<34}{values}{gains}    {means}")
    return "\n".join(lines)


def _records(arguments: Namespace, walk: Walk, text: str, found: Bucket) -> list[dict]:
    settings = {
        "text": text,
        "by": found.by,
        "start": found.start,
        "stop": found.stop,
        "local_branch": None if arguments.no_convert else arguments.local_branch,
        "global_branch": None if arguments.no_convert else arguments.global_branch,
        "chunk_tokens": walk.chunk_tokens,
        "context_tokens": walk.context_tokens,
        "cache_reuse_chunks": walk.cache_reuse_chunks,
        "fresh_base": walk.fresh_base,
        "learn": walk.learn.to_dict(),
        **loading_settings(arguments),
    }
    metrics = {"perplexity": found.perplexity, "mean_chunk_perplexity": found.chunk_mean}
    return [
        record(
            "eval temp-lora",
            arguments.model,
            metric,
            value,
            "1",
            found.tokens,
            seed=arguments.seed,
            arm=arm,
            **settings,
        )
        for metric, values in metrics.items()
        for arm, value in values.items()
    ]


def _draw(path: Path, buckets: list[Bucket], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in buckets[0].perplexity:
        label = arm if arm.startswith(BASE) else f"Temp-LoRA, {_title(arm)}"
        axes.plot(
            [found.stop for found in buckets], [found.perplexity[arm] for found in buckets], marker="o", label=label
        )
    axes.set(xlabel="tokens read", ylabel="perplexity", title=title)
    axes.legend()
    figure.savefig(path)
