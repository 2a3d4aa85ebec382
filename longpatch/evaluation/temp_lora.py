"""Perplexity of a document with Temp-LoRA and without, side by side in one pass (arXiv 2401.11504, section 4.1)."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LongpatchError
from ..temp_lora.checkpoint import fingerprint, load_state, save_state, with_prefix, without_prefix
from ..temp_lora.learner import Learner, temp_lora
from ..temp_lora.options import LearnOptions
from ..temp_lora.reader import Reader
from ..temp_lora.visible import sinks_of, visible

BASE = "base"
KIND = "walk"


@dataclass(frozen=True)
class Walk:
    """How a document is walked.

    Attributes:
        chunk_tokens: tokens scored, then learned, at a time.
        context_tokens: tokens before a chunk that it is learned with.
        inference_context_tokens: one or more numbers of tokens before a chunk that it is scored with, all of them in
            one walk; an empty tuple means `context_tokens`.
        cache_reuse_chunks: chunks to keep a scoring cache for; None = never build it anew.
        learn: settings of the adapter.
        fresh_base: the base, too, builds its cache anew for each chunk, from as many tokens as the arm that it is
            compared with: for a model that does not stream. Otherwise there is one, whose cache is never built anew.
    """

    chunk_tokens: int = 1024
    context_tokens: int = 3072
    inference_context_tokens: tuple[int, ...] = ()
    cache_reuse_chunks: int | None = 1
    learn: LearnOptions = field(default_factory=LearnOptions)
    fresh_base: bool = False

    @property
    def contexts(self) -> tuple[int, ...]:
        return self.inference_context_tokens or (self.context_tokens,)

    def base(self, context: int) -> str:
        """The arm that the one of an inference context is compared with."""
        return f"{BASE} {context}" if self.fresh_base and len(self.contexts) > 1 else BASE

    @property
    def bases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.base(context) for context in self.contexts))

    @property
    def learning_scores(self) -> int | None:
        """The context for which learning's own first forward already is the score: nothing has to be computed twice."""
        plain = self.cache_reuse_chunks == 1 and self.learn.dropout == 0
        return self.context_tokens if plain and self.context_tokens in self.contexts else None


@dataclass
class Document:
    """Scores of one document so far, in nats: `nll[arm]` is a list of [tokens] for each chunk; seconds by part.

    Arms are `Walk.bases` and one for each inference context, by its number of tokens.
    """

    nll: dict[str, list[Tensor]]
    seconds: dict[str, float]

    @property
    def position(self) -> int:
        return sum(len(part) for part in next(iter(self.nll.values())))


def walk_document(
    model: Any, ids: Tensor, walk: Walk, checkpoint: Path | None = None, save_seconds: float = 60
) -> Iterator[Document]:
    """Read `ids` [n] chunk by chunk, yielding the scores so far after each.

    Every token is scored before any update that saw it. The base reads the same text through the same attention with
    a cache that is never reset, unless `walk.fresh_base`. With `checkpoint`, a folder, the state is saved there every
    `save_seconds` and a walk that was cut off goes on from it.
    """
    arms = [*walk.bases, *(str(context) for context in walk.contexts)]
    document = Document({arm: [] for arm in arms}, dict.fromkeys((BASE, "score", "learn"), 0.0))
    readers = {str(context): Reader(model, context, walk.cache_reuse_chunks) for context in walk.contexts}
    for context in walk.contexts:
        readers[walk.base(context)] = Reader(model, context, 1) if walk.fresh_base else Reader(model, 0, None)
    with temp_lora(model, walk.learn) as learner:
        learner.start(rows=1)
        # what the state must belong to
        owner = {
            "model": fingerprint(model),
            "walk": repr(walk),
            "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        }
        if checkpoint is not None and (checkpoint / "state.safetensors").exists():
            _load(checkpoint, owner, document, readers, learner)
            yield document
        saved = time.monotonic()
        for start in range(document.position, len(ids), walk.chunk_tokens):
            _chunk(ids, start, min(start + walk.chunk_tokens, len(ids)), walk, document, readers, learner)
            finished = document.position == len(ids)
            if checkpoint is not None and (finished or time.monotonic() - saved > save_seconds):
                _save(checkpoint, owner, document, readers, learner)
                saved = time.monotonic()
            yield document


def _chunk(
    ids: Tensor, start: int, stop: int, walk: Walk, document: Document, readers: dict[str, Reader], learner: Learner
):
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        document.seconds[part] += time.perf_counter() - clock
        clock = time.perf_counter()

    assert learner.adapter is not None
    with learner.adapter.disabled():
        for base in walk.bases:
            document.nll[base].append(readers[base].score(ids, start, stop))
    lap(BASE)
    for context in walk.contexts:
        if context != walk.learning_scores:
            document.nll[str(context)].append(readers[str(context)].score(ids, start, stop))
    lap("score")
    seen = visible(ids[None, :start], None, walk.context_tokens, sinks_of(learner.causal))
    learned = learner.learn(seen.ids, ids[None, start:stop])
    if walk.learning_scores is not None:
        document.nll[str(walk.learning_scores)].append(learned.nll[0])
    lap("learn")


def _save(folder: Path, owner: dict, document: Document, readers: dict[str, Reader], learner: Learner) -> None:
    tensors, learner_data = learner.state()
    tensors = with_prefix("learner", tensors)
    data: dict[str, Any] = {"owner": owner, "learner": learner_data, "seconds": document.seconds, "readers": {}}
    for arm, reader in readers.items():
        held, data["readers"][arm] = reader.state()
        tensors |= with_prefix(f"reader {arm}", held)
        tensors |= {f"nll {arm}": torch.cat(document.nll[arm])}
    save_state(folder, KIND, tensors, data)


def _load(folder: Path, owner: dict, document: Document, readers: dict[str, Reader], learner: Learner) -> None:
    tensors, data = load_state(folder, KIND, "walk_document")
    different = [
        f"the checkpoint in {folder} is of another {name}" for name in owner if data["owner"][name] != owner[name]
    ]
    if different:
        raise LongpatchError("walk_document", different)
    learner.load_state(without_prefix("learner", tensors), data["learner"])
    document.seconds |= data["seconds"]
    for arm, reader in readers.items():
        reader.load_state(without_prefix(f"reader {arm}", tensors), data["readers"][arm])
        document.nll[arm].append(tensors[f"nll {arm}"])
