"""A raw row becomes tokens, and which of them are trained."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any, NamedTuple

import numpy as np

from ..errors import LongpatchError
from ..pool import in_order
from ..templates import find_template, render
from .conversation import Messages, read_row
from .sources import PIECE, Source
from .tokens import Tokens


class Document(NamedTuple):
    """Token ids `[n]` uint32, and for each whether it is trained; None: all are (a text)."""

    ids: np.ndarray
    trained: np.ndarray | None
    part: int = 0  # of the mixture
    last: bool = True  # a long text comes in several pieces


class Encoder:
    """Turns raw rows into documents: a text is trained throughout, of a conversation the answers alone.

    Args:
        template: of conversations, as `longpatch.templates.find_template` takes it.
        texts_only: refuse conversations.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", texts_only: bool = False):
        self.tokens, self.template, self.texts_only = Tokens(tokenizer), find_template(tokenizer, template), texts_only

    def __call__(self, numbered: tuple[int, Source]) -> Document:
        """Raises LongpatchError naming the row's place."""
        part, source = numbered
        read = read_row(source.place, source.row)
        if isinstance(read, str):
            ids = self.tokens.text(read, source.first, source.last) if read or not source.first else []
            return Document(np.asarray(ids, dtype=np.uint32), None, part, source.last)
        if self.texts_only:
            raise LongpatchError("data", [f"{source.place} is a conversation"], "token files hold plain texts")
        ids, trained = self._conversation(source.place, read)
        return Document(np.asarray(ids, dtype=np.uint32), np.asarray(trained, dtype=bool), part)

    def _conversation(self, place: str, messages: Messages) -> tuple[list[int], list[bool]]:
        """Up to the last answer. Prompts and answers are tokenised by themselves, as in a chat."""
        ids: list[int] = []
        trained: list[bool] = []
        done = ""
        try:
            for count, turn in enumerate(messages):
                if turn["role"] != "assistant":
                    continue
                prompt = render(self.tokens.tokenizer, self.template, messages[:count], prompt=True)
                answered = render(self.tokens.tokenizer, self.template, messages[: count + 1])
                if not prompt.startswith(done) or not answered.startswith(prompt):
                    raise LongpatchError("data", ["the chat template rewrites earlier turns"])
                question = self.tokens.inner(prompt[len(done) :]) if done else self.tokens.plain(prompt)
                answer = self.tokens.inner(answered[len(prompt) :])
                ids += question + answer
                trained += [False] * len(question) + self._until_end(answer)
                done = answered
        except LongpatchError as error:
            raise LongpatchError("data", [f"{place}: {reason}" for reason in error.reasons]) from error
        return ids, trained

    def _until_end(self, answer: list[int]) -> list[bool]:
        """Trained up to the token that ends the turn, not what the template puts after it."""
        ends = [place for place, token in enumerate(answer) if token in self.tokens.special]
        stop = ends[-1] + 1 if ends else len(answer)
        return [place < stop for place in range(len(answer))]


def encode(sources: Iterable[tuple[int, Source]], encoder: Encoder, workers: int = 1) -> Iterator[Document]:
    """Documents of `sources`, in their order, by `workers` processes; few are held at one time."""
    if workers == 1:
        yield from map(encoder, sources)
        return
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(encoder,)) as pool:
        for documents in in_order(pool, _encode, _batches(sources), 2 * workers):
            yield from documents


def _batches(sources: Iterable[tuple[int, Source]]) -> Iterator[list[tuple[int, Source]]]:
    """Lists of about as many characters as a piece has."""
    batch, size = [], 0
    for numbered in sources:
        batch.append(numbered)
        size += len(str(numbered[1].row.get("text", ""))) or 4096
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder  # of a worker process


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(batch: list[tuple[int, Source]]) -> list[Document]:
    return [_encoder(numbered) for numbered in batch]
