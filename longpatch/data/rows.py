"""Rows that a model reads: stretches of one long array of tokens."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .documents import Document
from .settings import DataSection

IGNORED = -100  # the label that cross-entropy leaves out


class Rows(Dataset):
    """`{input_ids, labels}`, each `[n]` int64, cut from `tokens` [N], which may be a memory map.

    `trained` [N] says which tokens are labels; None: all of them. With `bos`, each row starts with that token.
    """

    def __init__(self, tokens: np.ndarray, trained: np.ndarray | None, spans: np.ndarray, bos: int | None):
        self.tokens, self.trained, self.spans, self.bos = tokens, trained, spans, bos

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
    def from_documents(cls, documents: Iterable[Document], section: DataSection, bos: int | None) -> "Rows":
        """Rows of `documents`, packed or each by itself."""
        kept = list(documents)
        empty = np.empty(0, dtype=np.uint32)
        tokens = np.concatenate([empty, *(document.ids for document in kept)])
        trained = None
        if any(document.trained is not None for document in kept):
            trained = np.concatenate([_trained(document) for document in kept])
        if section.pack:
            return cls.packed(tokens, trained, section.length, section.min_length, bos)
        ends = np.cumsum([len(document.ids) for document in kept], dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        longest = section.length if bos is None else section.length - 1
        spans = np.stack((starts, np.minimum(ends, starts + longest)), axis=1)
        return cls(tokens, trained, spans[spans[:, 1] - spans[:, 0] >= section.min_length], bos)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, stop = self.spans[index]
        trained = None if self.trained is None else self.trained[start:stop]
        return as_row(Document(self.tokens[start:stop], trained), self.bos)


class StreamedRows(IterableDataset):
    """The same rows, made while they are read, over and over; one document is held at a time."""

    def __init__(self, documents: Callable[[], Iterable[Document]], section: DataSection, bos: int | None):
        self.documents, self.section, self.bos = documents, section, bos

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
            for document in self.documents():
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
    labels = ids.clone() if document.trained is None else ids.where(torch.from_numpy(document.trained), IGNORED)
    if bos is not None and (not len(ids) or ids[0] != bos):
        ids, labels = (torch.cat((ids.new_tensor([first]), row)) for first, row in ((bos, ids), (IGNORED, labels)))
    return {"input_ids": ids, "labels": labels}


def _trained(document: Document) -> np.ndarray:
    return np.ones(len(document.ids), dtype=bool) if document.trained is None else document.trained


def _part(document: Document, start: int, stop: int) -> Document:
    return Document(document.ids[start:stop], None if document.trained is None else document.trained[start:stop])


def _join(first: Document, second: Document) -> Document:
    trained: Any = None
    if first.trained is not None or second.trained is not None:
        trained = np.concatenate((_trained(first), _trained(second)))
    return Document(np.concatenate((first.ids, second.ids)), trained)
