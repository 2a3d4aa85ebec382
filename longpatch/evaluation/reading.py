"""How texts are read for perplexity: documents through arms into records."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LongpatchError
from .arms import Arm
from .cachefile import load_cache, save_cache
from .documents import Document
from .perplexity import MIB, cache_bytes, sliding_scores, stream_nll, window_nll
from .run import Measurement, Sample, Work, digest

ARMS = ("original", "lambda", "fresh", "truncate")


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a stream of numbers."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        n, mean = len(values), values.mean().item()
        squares = ((values - mean) ** 2).sum().item()
        total, difference = self.n + n, mean - self.mean
        self.squares += squares + difference**2 * self.n * n / total
        self.mean += difference * n / total
        self.n = total


@dataclass
class Span(Moments):
    """Moments of the NLL of a span of positions, and the bytes of the cache where the span ended."""

    held: int = 0


@dataclass(frozen=True)
class Reading:
    """How a document is read.

    Attributes:
        edges: positions in tokens at which spans begin and end, rising from 0; what lies past the last is one span. A
            span is named by its edges where the text ends within it, so that texts of any length have the same ones.
        chunk: tokens per forward.
        save_every: keep what a killed run needs to go on, each time so many tokens are read.
    """

    edges: tuple[int, ...]
    chunk: int = 512
    save_every: int = 1_000_000


def document_samples(
    documents: list[Document], tokenizer, length: int | None, repeat: int = 1, join: bool = False
) -> list[Sample]:
    """One sample a document: BOS and the first `length` tokens of the text, BOS included, read `repeat` times over.

    With `join` one sample of all: the first document so, and the others' tokens after it, without their BOS.

    Raises:
        LongpatchError: naming those of fewer than two tokens.
    """
    texts = [(document.identity, document.ids(tokenizer, length), document.text is not None) for document in documents]
    if join:
        (first, start, _), *others = texts
        whole = torch.cat([start, *(ids[int(ids[:1].tolist() == [tokenizer.bos_token_id]) :] for _, ids, _ in others)])
        joined = {
            "document": f"{first['document']} and {len(others)} more",
            "digest": digest(*(identity["digest"] for identity, _, _ in texts)),
        }
        texts = [(joined, whole, all(known for _, _, known in texts))]
    empty = [f"{identity['document']} has no token to predict" for identity, ids, _ in texts if len(ids) < 2]
    if empty:
        raise LongpatchError("documents", empty, "texts, and a --length, of two tokens at least, BOS included")
    samples = []
    for identity, ids, known in texts:
        text_bytes = repeat * len(tokenizer.decode(ids[1:]).encode()) if known else None
        ids = torch.cat((ids, ids[1:].repeat(repeat - 1))) if repeat > 1 else ids
        content = {"ids": ids, "bytes": text_bytes}
        samples.append(Sample({}, identity, content, len(ids) - 1))
    return samples


def doubling_edges(first: int, length: int) -> tuple[int, ...]:
    """0, first, 2 first, 4 first, ... up to the first of them that is not below `length`."""
    edges = [0]
    while edges[-1] < length:
        edges.append(max(first, 2 * edges[-1]))
    return tuple(edges)


def measure_positions(model, tokenizer, reading: Reading, arm: Arm, sample: Sample, work: Work) -> list[Measurement]:
    """NLL of each span of positions ("nll") and of the whole document ("nll_document", "bits_per_byte").

    Where one cache is kept, "cache" is what it holds at the end of each span.

    Spans carry the variance over their tokens; with spans of one token, mean, variance and count per position come
    from pooling documents. A document through one kept cache can be interrupted and taken up again.
    """
    ids = sample.content["ids"]
    within = [edge for edge in reading.edges if edge < len(ids) - 1]
    edges = [*within, next((edge for edge in reading.edges if edge >= len(ids) - 1), len(ids) - 1)]
    spans = {span: Span() for span in itertools.pairwise(edges)}
    streamed = not (arm.window or arm.keep)
    state = State(work.state, arm, sample) if work.state is not None and streamed else None
    done = 0 if state is None else state.restore(model, spans)
    work.tick(done)
    begun = None if state is None else state.cache
    for start, nll, cache in _parts(model, tokenizer, reading, arm, ids, done, begun):
        for (first, last), moments in spans.items():
            part = nll[max(0, first - start) : max(0, last - start)]
            if len(part):
                moments.add(part)
                moments.held = cache_bytes(cache)
        work.tick(len(nll))
        read = start + len(nll)
        if state is not None and read // reading.save_every > start // reading.save_every and read < len(ids) - 1:
            state.save(cache, read, spans)
    if state is not None:
        state.remove()
    return _measurements(spans, sample.content["bytes"])


def _parts(model, tokenizer, reading: Reading, arm: Arm, ids: Tensor, done: int, cache: Any):
    """(first position, NLL [tokens], cache) of each part; position p is that of the token after ids[p]."""
    place = 0
    if arm.window:
        for nll in window_nll(model, ids, arm.window, tokenizer.bos_token_id, batch=max(1, 4096 // arm.window)):
            yield place, nll, None
            place += len(nll)
        return
    if arm.keep:
        for scores in sliding_scores(model, ids, arm.keep, arm.keep // 2):
            yield place, scores.nll, None
            place += len(scores.nll)
        return
    for chunk in stream_nll(model, ids[done:], reading.chunk, cache):
        yield done + chunk.start, chunk.nll, chunk.cache


def _measurements(spans: dict[tuple[int, int], Span], text_bytes: int | None) -> list[Measurement]:
    measured = [
        Measurement("nll", m.mean, "nat", m.n, {"start": first, "stop": last}, {"variance": m.squares / m.n})
        for (first, last), m in spans.items()
        if m.n
    ]
    measured += [
        Measurement("cache", m.held / MIB, "MiB", 1, {"start": first, "stop": last})
        for (first, last), m in spans.items()
        if m.held and last - first > 1
    ]
    n = sum(moments.n for moments in spans.values())
    nats = sum(moments.mean * moments.n for moments in spans.values())
    measured.append(Measurement("nll_document", nats / n, "nat", n))
    if text_bytes:
        bits = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
        measured.append(Measurement("bits_per_byte", bits / text_bytes, "bit", text_bytes))
    return measured


@dataclass
class State:
    """Where one document was left: a folder with the cache as safetensors and the rest as JSON, each written whole."""

    folder: Path
    arm: Arm
    sample: Sample
    cache: Any = field(default=None, init=False)

    def restore(self, model, spans: dict[tuple[int, int], Span]) -> int:
        """Fill `spans` and `cache` from the folder; returns the number of tokens scored."""
        path = self.folder / "state.json"
        if not path.is_file():
            return 0
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["arm"] != self.arm.label or saved["sample"] != self.sample.identity:
            return 0
        for span, numbers in zip(spans, saved["spans"], strict=True):
            spans[span] = Span(*numbers)
        self.cache = load_cache(model, self.folder / saved["cache"])
        return saved["read"]

    def save(self, cache, read: int, spans: dict[tuple[int, int], Span]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"cache-{read}.safetensors"
        save_cache(cache, self.folder / name)
        numbers = [[m.n, m.mean, m.squares, m.held] for m in spans.values()]
        state = {"arm": self.arm.label, "sample": self.sample.identity, "read": read, "cache": name, "spans": numbers}
        new = self.folder / "state.json.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        new.replace(self.folder / "state.json")
        for old in self.folder.glob("cache-*.safetensors"):
            if old.name != name:
                old.unlink()

    def remove(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def measure_sliding(
    model, length: int, stride: int, context: int, new_only: bool, sample: Sample, work: Work
) -> Iterator[Measurement]:
    """NLL ("nll_document") and next-token accuracy over windows of `length` tokens, each `stride` after the last."""
    nll, correct = Moments(), Moments()
    ids = sample.content["ids"]
    for scores in sliding_scores(model, ids, length, stride, context, new_only):
        nll.add(scores.nll)
        correct.add(scores.correct)
        work.tick(min(stride, len(scores.nll)))
    yield Measurement("nll_document", nll.mean, "nat", nll.n, {}, {"variance": nll.squares / nll.n})
    yield Measurement("accuracy", correct.mean, "1", correct.n)
