"""What became of each part of a mixture."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from .documents import Document
from .mixture import Part
from .settings import DataSection


@dataclass
class Count:
    """Of one part.

    Attributes:
        documents, tokens, trained: that are read; how many of the tokens are labels.
        cut: texts longer than a row, of which the end is left out (documents that are packed are never cut).
        long: conversations longer than a row, left out.
        short: documents below the least length, left out unless they are packed.
        empty: texts with nothing in them, left out.
    """

    name: str
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    long: int = 0
    short: int = 0
    empty: int = 0


def start_counts(parts: list[Part]) -> list[Count]:
    return [Count(part.name) for part in parts]


def keep(
    documents: Iterable[Document], section: DataSection, counts: list[Count], long: list[int] | None = None
) -> Iterator[Document]:
    """The documents that rows are made of; those left out are counted, and `long` gets the tokens of too long ones."""
    tokens = 0
    for document in documents:
        count, size = counts[document.part], len(document.ids)
        if document.trained is not None and size > section.room:
            count.long += 1
            if long is not None:
                long.append(size)
            continue
        tokens += size
        if document.last:
            if not tokens:
                count.empty += 1
                continue
            count.documents += 1
            if not section.pack:
                count.cut += tokens > section.room
                count.short += tokens < section.min_length
            tokens = 0
        count.tokens += size
        count.trained += size if document.trained is None else int(document.trained.sum())
        yield document


def table(counts: Iterable[Count]) -> str:
    rows = [asdict(count) for count in counts]
    names = [name for name in asdict(Count("")) if name != "name"]
    lines = ["".join(f"{name:>12}" for name in names)]
    lines += ["".join(f"{row[name]:>12,}" for name in names) + f"  {row['name']}" for row in rows]
    return "\n".join(lines)
