"""Files, folders and data sets, read one raw row at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LongpatchError

SUPPORTED = ".txt, .jsonl, a folder of them, a token .bin, or hub:NAME[:SPLIT] with the package datasets"


class Source(NamedTuple):
    """One raw row, and where it stands, for messages."""

    place: str  # "books/a.txt", or "rows.jsonl:7"
    row: dict[str, Any]


def read_sources(paths: Iterable[str]) -> Iterator[Source]:
    """Raw rows of all `paths`, in order; a .txt file is one row `{text}`.

    Raises:
        LongpatchError: naming the file and line.
    """
    for path in paths:
        if path.startswith("hub:"):
            yield from _hub(path)
        else:
            for file in _files(Path(path)):
                yield from _jsonl(file) if file.suffix == ".jsonl" else _text(file)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
        if not found:
            raise LongpatchError("read_sources", [f"no .txt or .jsonl file in {path}"], SUPPORTED)
        return found
    if not path.is_file():
        raise LongpatchError("read_sources", [f"no file {path}"], SUPPORTED)
    if path.suffix not in (".txt", ".jsonl"):
        raise LongpatchError("read_sources", [f"{path} is neither .txt nor .jsonl"], SUPPORTED)
    return [path]


def _text(path: Path) -> Iterator[Source]:
    try:
        yield Source(str(path), {"text": path.read_text(encoding="utf-8")})
    except UnicodeDecodeError as error:
        raise LongpatchError("read_sources", [f"{path} is not UTF-8: {error}"]) from error


def _jsonl(path: Path) -> Iterator[Source]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise LongpatchError("read_sources", [f"{path}:{number} is not JSON: {error}"]) from error
            if not isinstance(row, dict):
                raise LongpatchError("read_sources", [f"{path}:{number} is not a JSON object"])
            yield Source(f"{path}:{number}", row)


def _hub(path: str) -> Iterator[Source]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LongpatchError("read_sources", [f"{path} needs the package datasets"], "pip install datasets") from error
    name, _, split = path.removeprefix("hub:").partition(":")
    for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True)):
        yield Source(f"{path}:{number}", dict(row))
