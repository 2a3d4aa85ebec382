"""Texts in, rows out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.mixture import parse_parts, read_mixture
from ..data.sources import Source
from ..errors import LongpatchError

CALL = "synthesize"


def read_texts(paths: list[str]) -> dict[str, str]:
    """All texts of `paths`, whole, by their place.

    Raises:
        LongpatchError: for rows that are not texts.
    """
    texts: dict[str, str] = {}
    for _, source in read_mixture(parse_parts(paths)):
        texts[source.place] = texts.get(source.place, "") + _text(source)
    return texts


def _text(source: Source) -> str:
    text = source.row.get("text")
    if not isinstance(text, str):
        raise LongpatchError(CALL, [f"{source.place} has no text"], ".txt files and {text} rows")
    return text


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; a file that fails half-way is not left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
