"""Texts to read: files, folders, rows of JSON lines, files of token ids."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.binary import read_binary
from ..data.sources import parse_row
from ..errors import LongpatchError
from .run import digest

SUPPORTED = "UTF-8 .txt files, .jsonl rows with a text, .bin files of token ids, or folders of these"


@dataclass(frozen=True)
class Document:
    """A named text: `text`, or `file` where it holds token ids already."""

    name: str
    text: str | None = None
    file: Path | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Its name, and what tells it from others of that name."""
        if self.file is None:
            return {"document": self.name, "digest": digest(self.text)}
        with self.file.open("rb") as file:
            return {"document": self.name, "digest": hashlib.file_digest(file, "sha256").hexdigest()[:12]}

    def ids(self, tokenizer, limit: int | None = None) -> Tensor:
        """Token ids [n], BOS first where the tokenizer has one; the first `limit` of them.

        Raises:
            LongpatchError: for a token file of another tokenizer.
        """
        if self.file is not None:
            return torch.from_numpy(read_binary(self.file, tokenizer, described=False)[:limit].astype("int64"))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        text = self.text or ""
        cut = len(text) if limit is None else 16 * limit  # enough of most texts, too little of many blanks
        ids = tokenizer.encode(text[:cut], add_special_tokens=False)
        while limit is not None and len(ids) <= limit and cut < len(text):
            cut *= 2
            ids = tokenizer.encode(text[:cut], add_special_tokens=False)
        return torch.tensor((bos + ids)[:limit])


def read_documents(paths: list[Path], field: str = "text", start: int = 0, limit: int | None = None) -> list[Document]:
    """All documents of `paths`, in order of name, from number `start` on, `limit` of them.

    Raises:
        LongpatchError: naming every path that is missing or holds nothing readable.
    """
    reasons, documents = [], []
    for path in paths:
        try:
            files = sorted(p for p in path.iterdir() if p.suffix in _READERS) if path.is_dir() else [path]
            found = [document for file in files for document in _READERS.get(file.suffix, _read_text)(file, field)]
        except LongpatchError as error:
            reasons += error.reasons
            continue
        except (OSError, UnicodeDecodeError) as error:
            reasons.append(f"{path}: {type(error).__name__}: {error}")
            continue
        if not found:
            reasons.append(f"{path} holds no text")
        documents += found
    if reasons:
        raise LongpatchError("documents", reasons, SUPPORTED)
    chosen = documents[start:] if limit is None else documents[start : start + limit]
    if not chosen:
        raise LongpatchError("documents", [f"--start {start} is past the last of {len(documents)} documents"])
    return chosen


def _read_text(path: Path, field: str) -> Iterator[Document]:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        yield Document(path.name, text)


def _read_rows(path: Path, field: str) -> Iterator[Document]:
    for number, (place, row) in enumerate(_placed_rows(path)):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise LongpatchError("documents", [f"{place} has no text in {field!r}"])
        yield Document(str(row.get("id", f"{path.name}:{number}")), row[field])


def _read_tokens(path: Path, field: str) -> Iterator[Document]:
    if path.stat().st_size:
        yield Document(path.name, file=path)


_READERS = {".txt": _read_text, ".jsonl": _read_rows, ".bin": _read_tokens}


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON lines file, or of a JSON file that is one list.

    Raises:
        LongpatchError: naming file and line; for a file without rows.
    """
    try:
        rows = [row for _, row in _placed_rows(path)]
    except OSError as error:
        raise LongpatchError("rows", [f"{path}: {error.strerror}"], "JSON lines, or a list in .json") from error
    if not rows:
        raise LongpatchError("rows", [f"{path} holds no rows"], "JSON lines, or a list in .json")
    return rows


def check_row(call: str, number: int, row: dict, **fields: type | tuple[type, ...]) -> None:
    """Raises LongpatchError naming each of `fields`, of these types, that row `number` does not have, or has empty."""
    wrong = [name for name, kind in fields.items() if not isinstance(row.get(name), kind) or row[name] in ("", [])]
    if wrong:
        reasons = [f"row {number} has no {name!r}" for name in wrong]
        raise LongpatchError(call, reasons, f"rows with {', '.join(fields)}")


def _placed_rows(path: Path) -> list[tuple[str, dict]]:
    """Each with "rows.jsonl:7", for messages."""
    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise LongpatchError("rows", [f"{path} is not JSON: {error}"]) from error
        lines = [json.dumps(row).encode() for row in rows] if isinstance(rows, list) else [content]
    else:
        lines = content.split(b"\n")
    placed = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(place, parse_row(place, line)) for place, line in placed]


def read_texts(paths: list[Path]) -> list[str]:
    """The texts of all documents of `paths`.

    Raises:
        LongpatchError: as `read_documents`, and for token files.
    """
    documents = read_documents(paths)
    reasons = [f"{document.file} holds token ids, where a text is needed" for document in documents if document.file]
    if reasons:
        raise LongpatchError("documents", reasons, "UTF-8 .txt files, .jsonl rows with a text, or folders of these")
    return [document.text or "" for document in documents]
