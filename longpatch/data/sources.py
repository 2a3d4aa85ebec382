"""Files, folders and data sets, read one raw row at a time."""

import json
import re
from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LongpatchError

SUPPORTED = ".txt, .jsonl, a folder of them, a token .bin, or hub:OWNER/NAME[/CONFIG][:SPLIT] with the package datasets"
PIECE = 2**18  # characters of a text file that are read at one time
BREAK = re.compile(r"\n(?=\S)")


class Source(NamedTuple):
    """One raw row, and where it stands, for messages. A long text file comes as several: `first` ... `last`."""

    place: str  # "books/a.txt", or "rows.jsonl:7"
    row: dict[str, Any]
    first: bool = True
    last: bool = True


def find_files(path: str) -> list[Path]:
    """The files that `path` stands for.

    Raises:
        LongpatchError: where there are none.
    """
    found = Path(path)
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.suffix in (".txt", ".jsonl"))
        reason = None if files else f"no .txt or .jsonl file in {path}"
    else:
        files = [found]
        reason = None if found.suffix in (".txt", ".jsonl") else f"{path} is neither .txt nor .jsonl"
        reason = reason if found.is_file() else f"no file {path}"
    if reason:
        raise LongpatchError("data", [reason], SUPPORTED)
    return files


def count_rows(files: list[Path]) -> int:
    """Rows of `files`: a .txt file is one."""
    total = 0
    for file in files:
        if file.suffix == ".txt":
            total += 1
        else:
            with file.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
    return total


def read_rows(files: list[Path], chosen: Container[int]) -> Iterator[Source]:
    """Those rows of `files` whose numbers, counted from 0 through all of them, are `chosen`.

    Raises:
        LongpatchError: naming the file and line.
    """
    number = 0
    for file in files:
        if file.suffix == ".txt":
            if number in chosen:
                yield from _text(file)
            number += 1
            continue
        with file.open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if number in chosen:
                    place = f"{file}:{line_number}"
                    yield Source(place, parse_row(place, line))
                number += 1


def parse_row(place: str, line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        LongpatchError: naming `place`, for a line that is none, or that holds half a character, which is no text.
    """
    try:
        row = json.loads(line)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise LongpatchError("data", [f"{place} holds a lone surrogate, half of a character"]) from error
    except (ValueError, RecursionError) as error:
        raise LongpatchError("data", [f"{place} is not JSON: {error}"]) from error
    if not isinstance(row, dict):
        raise LongpatchError("data", [f"{place} is not a JSON object"])
    return row


def _text(path: Path) -> Iterator[Source]:
    """A text in pieces that end with a line: however long the file, little of it is held."""
    first, held = True, ""
    try:
        with path.open(encoding="utf-8") as file:
            while more := file.read(PIECE):
                held += more
                cut = _cut(held)
                if cut:
                    yield Source(str(path), {"text": held[:cut]}, first, last=False)
                    first, held = False, held[cut:]
    except UnicodeDecodeError as error:
        line = next(number for number, line in enumerate(path.open("rb"), start=1) if not _is_utf8(line))
        raise LongpatchError("data", [f"{path}:{line} is not UTF-8"]) from error
    yield Source(str(path), {"text": held}, first)


def _cut(held: str) -> int:
    """Where to cut: after the last line, or before the last word of a very long one; 0: not yet."""
    if len(held) < PIECE:
        return 0
    breaks = [match.end() for match in BREAK.finditer(held, len(held) // 2)]
    if breaks:
        return breaks[-1]
    return max(held.rfind(" "), 0) or (len(held) if len(held) > 4 * PIECE else 0)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_hub(path: str, rows: int | None, seed: int) -> Iterator[Source]:
    """A data set of the hub as it streams, or `rows` of it, shuffled.

    Raises:
        LongpatchError: where it cannot be opened, with what the hub says, as of a missing configuration.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LongpatchError("data", [f"{path} needs the package datasets"], "pip install datasets") from error
    name, _, split = path.removeprefix("hub:").partition(":")
    kind = None
    if not name.startswith("/") and name.count("/") > 1:
        owner, dataset, kind = name.split("/", 2)
        name = f"{owner}/{dataset}"
    try:
        stream = load_dataset(name, kind, split=split or "train", streaming=True)
    except (ValueError, OSError) as error:
        raise LongpatchError("data", [f"{path} cannot be opened: {' '.join(str(error).split())}"], SUPPORTED) from error
    if rows is not None:
        stream = stream.shuffle(seed=seed)
    for number, row in enumerate(islice(stream, rows)):
        yield Source(f"{path}:{number}", dict(row))
