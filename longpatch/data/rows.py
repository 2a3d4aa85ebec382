"""Rows that a model reads: stretches of one long array of tokens."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .counts import Count
from .documents import Document
from .settings import DataSection
from .store import Store

IGNORED = -100  # the label that cross-entropy leaves out


class Rows(Dataset):
    """`{input_ids, labels}`, each `[n]` int64, cut from `tokens` [N], which may be a memory map.

    `trained` [N] says which tokens are labels; None: all of them. With `bos`, each row starts with that token.
    `counts` say what became of each source, `lengths` [D] are tokens of all its documents, before any cut and with
    those that are left out for their length; both are empty for a token file.
    """

    def __init__(self, tokens: np.ndarray, trained: np.ndarray | None, spans: np.ndarray, bos: int | None):
        self.tokens, self.trained, self.spans, self.bos = tokens, trained, spans, bos
        self.counts: list[Count] = []
        self.lengths = np.empty(0, dtype=np.int64)

    @classmethod
    def packed(
        cls, tokens: np.ndarray, trained: np.ndarray | None, length: int, min_length: int, bos: int | None
    ) -> "Rows":
        """Rows of `length` tokens, one after another; the last one is kept where it has `min_length`."""
        stride = length if bos is None else length - 1
        starts = np.arange(0, len(tokens), stride)
        spans = np.stack((starts, np.minimum(starts + stride, len(tokens))), axis=1)
        return cls(tokens, trained, spans[spans[:, 1] - spans[:, 0] >= min_length - (length - stride)], bos)

    @classmethod
    def from_store(cls, store: Store, section: DataSection, bos: int | None) -> "Rows":
        """Rows of a store's documents, packed or each by itself."""
        if section.pack:
            rows = cls.packed(store.tokens, store.trained, section.length, section.min_length, bos)
        else:
            starts = np.concatenate((np.zeros(1, dtype=np.int64), store.ends))[:-1]
            spans = np.stack((starts, np.minimum(store.ends, starts + section.room)), axis=1)
            rows = cls(store.tokens, store.trained, spans[store.ends - starts >= section.min_length], bos)
        rows.counts, rows.lengths = store.counts, np.concatenate((np.diff(store.ends, prepend=0), store.long))
        return rows

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises IndexError past the last row, so that rows can be iterated over."""
        start, stop = self.spans[index]
        trained = None if self.trained is None else self.trained[start:stop]
        return as_row(Document(self.tokens[start:stop], trained), self.bos)


class StreamedRows(IterableDataset):
    """The same rows, made while they are read, over and over; one document is held at a time."""

    def __init__(
        self, documents: Callable[[], Iterable[Document]], section: DataSection, bos: int | None, counts: list[Count]
    ):
        self.documents, self.section, self.bos, self.counts = documents, section, bos, counts

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yielded = False
            for row in self._once():
                yielded = True
                yield row
            if not yielded:
                return

    def _once(self) -> Iterator[dict[str, Tensor]]:
        section = self.section
        length = section.length if self.bos is None else section.length - 1
        if not section.pack:
            for document in _whole(self.documents(), section.length):
                if len(document.ids) >= section.min_length:
                    yield as_row(_part(document, 0, length), self.bos)
            return
        left: Document | None = None
        for document in self.documents():
            held = document if left is None else _join(left, document)
            for start in range(0, len(held.ids) - length + 1, length):
                yield as_row(_part(held, start, start + length), self.bos)
            left = _part(held, len(held.ids) // length * length, len(held.ids))
        if left is not None and len(left.ids) >= section.min_length:
            yield as_row(left, self.bos)


def as_row(document: Document, bos: int | None) -> dict[str, Tensor]:
    ids = torch.from_numpy(document.ids.astype(np.int64))
    labels = ids.clone() if document.trained is None else ids.where(torch.tensor(document.trained), IGNORED)
    if bos is not None and (not len(ids) or ids[0] != bos):
        ids, labels = (torch.cat((ids.new_tensor([first]), row)) for first, row in ((bos, ids), (IGNORED, labels)))
    return {"input_ids": ids, "labels": labels}


def _whole(documents: Iterable[Document], length: int) -> Iterator[Document]:
    """Documents with their pieces put together, up to `length` tokens."""
    held: Document | None = None
    for piece in documents:
        held = piece if held is None else _join(held, piece)
        held = _part(held, 0, length)
        if piece.last:
            yield held
            held = None


def _trained(document: Document) -> np.ndarray:
    return np.ones(len(document.ids), dtype=bool) if document.trained is None else document.trained


def _part(document: Document, start: int, stop: int) -> Document:
    return Document(document.ids[start:stop], None if document.trained is None else document.trained[start:stop])


def _join(first: Document, second: Document) -> Document:
    trained: Any = None
    if first.trained is not None or second.trained is not None:
        trained = np.concatenate((_trained(first), _trained(second)))
    return Document(np.concatenate((first.ids, second.ids)), trained)
