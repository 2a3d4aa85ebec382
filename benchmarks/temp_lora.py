"""What each setting of Temp-LoRA is worth: one walk over the beginning of a book for each row of a table.

    python -m benchmarks.temp_lora BOOK.txt sweep --out FILE     ranks, rates, epochs, contexts, chunks
    python -m benchmarks.temp_lora BOOK.txt context --out FILE   the base with four times the context
    python -m benchmarks.temp_lora BOOK.txt models --out FILE    the model as it is, converted, interpolated
    python -m benchmarks.temp_lora BOOK.txt cheaper --out FILE   caches kept, queries alone, a detached context

The model is the one in the package. Rows that FILE already holds are not run again. Each other row has a process of its
own: its peak memory is counted while the base alone reads eight chunks, then over the whole walk. Operations are
counted by PyTorch over one chunk in the middle: matrix products, and attention, which is computed by `blocked` for
this, as PyTorch cannot see into the native kernel (blocks at the window's edge are counted whole). Seconds are of the
processor, shared out as wall time was.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from longpatch import convert_model, interpolate_rope
from longpatch.demo import load
from longpatch.evaluation.memory import peak_bytes, reset_peak
from longpatch.evaluation.temp_lora import BASE, Walk, walk_document
from longpatch.results import read_records, record, write_records
from longpatch.temp_lora import LearnOptions, temp_lora
from longpatch.temp_lora.reader import Reader
from longpatch.temp_lora.visible import sinks_of, visible

LEARN = LearnOptions(rank=16, alpha=16, dropout=0.0, learning_rate=1e-3, epochs=1)
CHOSEN = Walk(512, 256, learn=LEARN)
PAPER = LearnOptions(alpha=64)
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


@dataclass(frozen=True)
class Row:
    """One walk: `window` of the conversion (None: unconverted), `factor` of rope interpolation (ntk)."""

    name: str
    walk: Walk
    window: int | None = 256
    factor: float | None = None

    def model(self, implementation: str = "auto"):
        model, tokenizer = load()
        if self.factor is not None:
            model = interpolate_rope(model, method="ntk", factor=self.factor)
        if self.window is not None:
            model = convert_model(model, self.window, 4, implementation=implementation)
        return model, tokenizer


def learning(**changes) -> Walk:
    return replace(CHOSEN, learn=replace(LEARN, **changes))


def ranked(rank: int) -> Walk:
    return learning(rank=rank, alpha=rank)


def sweep() -> list[Row]:
    return [
        Row("chosen", CHOSEN),
        Row("rank 4", ranked(4)),
        Row("rank 64", ranked(64)),
        Row("rate 3e-4", learning(learning_rate=3e-4)),
        Row("rate 3e-3", learning(learning_rate=3e-3)),
        Row("2 epochs", learning(epochs=2)),
        Row("context 64", replace(CHOSEN, context_tokens=64)),
        Row("context 1024", replace(CHOSEN, context_tokens=1024)),
        Row("chunk 256", replace(CHOSEN, chunk_tokens=256)),
        Row("chunk 1024", replace(CHOSEN, chunk_tokens=1024)),
        Row("the paper's", replace(CHOSEN, learn=PAPER)),
    ]


def context() -> list[Row]:
    return [
        Row("window 64, context 64", replace(CHOSEN, context_tokens=64), window=64),
        Row("window 256, context 256", CHOSEN),
    ]


def models() -> list[Row]:
    short = Walk(128, 128, learn=LEARN, fresh_base=True)
    return [
        Row("as it is", short, window=None),
        Row("converted", short),
        Row("rope interpolated", short, window=None, factor=4.0),
        Row("rope interpolated, context 384", replace(short, context_tokens=384), window=None, factor=4.0),
    ]


def cheaper() -> list[Row]:
    return [
        Row("rebuilt each chunk", CHOSEN),
        Row("cache kept 4 chunks", replace(CHOSEN, cache_reuse_chunks=4)),
        Row("cache never rebuilt", replace(CHOSEN, cache_reuse_chunks=None)),
        Row("queries alone", replace(learning(trainable="queries"), cache_reuse_chunks=None)),
        Row("context detached", learning(context_grad=False)),
        Row("context detached, 2 epochs", learning(context_grad=False, epochs=2)),
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {table.__name__: table for table in (sweep, context, models, cheaper)}


def encoded(text: Path, tokens: int, tokenizer) -> torch.Tensor:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * tokens], add_special_tokens=False)
    return torch.tensor(start + ids)[:tokens]


def operations(model, ids: torch.Tensor, walk: Walk) -> dict[str, int]:
    """Floating-point operations of one chunk of each arm, far enough in that every context is full."""
    chunk = walk.chunk_tokens
    start = chunk * -(-max(walk.context_tokens, 256) // chunk)
    readers = {BASE: base_reader(model, walk)}
    if walk.learning_scores is None:
        readers["score"] = Reader(model, walk.context_tokens, walk.cache_reuse_chunks)
    spent = {}
    for name, reader in readers.items():
        reader.score(ids, 0, start)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            reader.score(ids, start, start + chunk)
        spent[name] = counter.get_total_flops()
    with temp_lora(model, walk.learn) as learner:
        seen = visible(ids[None, :start], None, walk.context_tokens, sinks_of(model)).ids
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            learner.learn(seen, ids[None, start : start + chunk])
        spent["learn"] = counter.get_total_flops()
    return spent


def base_reader(model, walk: Walk) -> Reader:
    return Reader(model, walk.context_tokens, 1 if walk.fresh_base else None)


def peak_of_base(model, ids: torch.Tensor, walk: Walk) -> int:
    """Bytes held at most while the base alone reads eight chunks."""
    reader = base_reader(model, walk)
    reset_peak()
    for start in range(0, 8 * walk.chunk_tokens, walk.chunk_tokens):
        reader.score(ids, start, start + walk.chunk_tokens)
    return peak_bytes()


def measure(table: str, row: Row, text: Path, tokens: int) -> list[dict]:
    model, tokenizer = row.model()
    ids = encoded(text, tokens, tokenizer)
    base_peak = peak_of_base(model, ids, row.walk)
    reset_peak()
    began, document = time.process_time(), None
    for document in walk_document(model, ids, row.walk):  # noqa: B007
        pass
    assert document is not None
    used, wall, peak = time.process_time() - began, sum(document.seconds.values()), peak_bytes()
    per_chunk = operations(row.model("blocked")[0], ids, row.walk)
    nll = {arm: torch.cat(chunks)[1:].double() for arm, chunks in document.nll.items()}
    settings = {"table": table, "row": row.name, "text": text.name, "tokens": tokens}
    settings |= {"window": row.window, "factor": row.factor, "walk": asdict(row.walk)}

    def line(metric: str, value: float, unit: str, **also) -> dict:
        return record("benchmarks.temp_lora", "demo", metric, value, unit, len(ids) - 1, seed=0, **settings, **also)

    base, lora = nll[BASE], nll[str(row.walk.context_tokens)]
    lines = [line("perplexity", values.mean().exp().item(), "1", arm=arm) for arm, values in nll.items()]
    for third, (before, after) in enumerate(zip(base.chunk(3), lora.chunk(3), strict=True)):
        lines.append(line("below_base", 1 - (after.mean() - before.mean()).exp().item(), "1", third=third))
    for part, seconds in document.seconds.items():
        lines.append(line("time", 1e3 * used * seconds / wall / len(ids), "ms/token", part=part))
    lines += [line("operations", n / row.walk.chunk_tokens, "1/token", part=part) for part, n in per_chunk.items()]
    peaks = {BASE: base_peak, "walk": peak}
    return [*lines, *(line("peak_memory", size / 2**20, "MiB", part=part) for part, size in peaks.items())]


def summary(lines: list[dict]) -> str:
    """One row of the table."""

    def values(metric: str) -> list[float]:
        return [line["value"] for line in lines if line["metric"] == metric]

    base, lora = values("perplexity")
    thirds = " ".join(f"{gain:6.1%}" for gain in values("below_base"))
    parts = {part: [0.0, 0.0] for part in (BASE, "score", "learn")}
    for line in lines:
        if line["metric"] in ("time", "operations"):
            parts[line["settings"]["part"]][line["metric"] == "operations"] = line["value"]
    costs = "  ".join(f"{part} {ms:.2f} ms {flops / 1e6:.0f} MFLOP" for part, (ms, flops) in parts.items())
    name = lines[0]["settings"]["row"]
    gain, peaks = 1 - lora / base, ", ".join(f"{peak:.0f}" for peak in values("peak_memory"))
    return f"{name:<32}{base:8.2f}{lora:8.2f}{gain:8.1%}   {thirds}   {costs}  {peaks} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    done = read_records(arguments.out) if arguments.out.exists() else []
    done = [line for line in done if line["settings"]["tokens"] == arguments.tokens]
    print(f"{'':<32}{'base':>8}{'learned':>8}{'below':>8}   thirds                 cost of a token", flush=True)
    for table in arguments.tables:
        for row in TABLES[table]():
            found = [
                line for line in done if line["settings"]["table"] == table and line["settings"]["row"] == row.name
            ]
            if not found:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    found = process.submit(measure, table, row, arguments.text, arguments.tokens).result()
                done += found
                write_records(arguments.out, done)
            print(summary(found), flush=True)


if __name__ == "__main__":
    main()
