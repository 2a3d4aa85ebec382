"""Several sources in one: how much of each, and in which order."""

import os
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LongpatchError, is_number
from .sources import Source, count_rows, find_files, read_hub, read_rows

CAP = re.compile(r"(.+)\[([^\[\]]*)\]")
SUPPORTED = "PATH, PATH[ROWS], a list of these, or {PATH: weight}"


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        name: as the configuration has it.
        path: file, folder or hub data set, below the data root.
        cap: so many rows of it are chosen at random; None: all.
        weight: how often those are read: 2 is twice, 0.5 a random half of them.
    """

    name: str
    path: str
    cap: int | None = None
    weight: float = 1.0

    @property
    def is_hub(self) -> bool:
        return self.path.startswith("hub:")


def parse_parts(value: str | list[str] | dict[str, Any], root: str | None = None) -> list[Part]:
    """Parts of `data.train` or `data.validation`.

    Raises:
        LongpatchError: naming every entry that cannot be read.
    """
    names = [value] if isinstance(value, str) else value
    weights = value if isinstance(value, dict) else dict.fromkeys(names, 1.0)
    parts, reasons = [], []
    if len(weights) < len(names):
        reasons.append("a path is named twice, where {PATH: 2} reads it twice")
    for name, weight in weights.items():
        match = CAP.fullmatch(name)
        path, cap = match.groups() if match else (name, None)
        if cap is not None and not (cap.isdecimal() and int(cap)):
            reasons.append(f"{name}: [{cap}] is no number of rows")
        if not is_number(weight) or not 0 < weight < float("inf"):
            reasons.append(f"{name}: weight={weight!r} must be a number above 0")
        if path.startswith("hub:") and weight != 1.0:
            reasons.append(f"{name}: the rows of a hub data set are not known, so it takes no weight")
        if not path.startswith("hub:"):
            path = os.path.join(os.path.expanduser(root or ""), os.path.expanduser(path))
        parts.append(Part(name, path, int(cap) if cap and cap.isdecimal() else None, weight))
    if reasons or not parts:
        raise LongpatchError("data", reasons or ["no path is given"], SUPPORTED)
    return parts


def choose_rows(part: Part, rows: int, seed: int) -> list[Collection[int]]:
    """Row numbers of each pass over a part of `rows` rows; the same for the same seed."""
    drawn = random.Random(f"{seed} {part.name}")
    numbers: range | list[int] = range(rows)  # which takes no memory for each
    if part.cap is not None and part.cap < rows:
        numbers = drawn.sample(numbers, part.cap)
    whole, rest = divmod(part.weight, 1)
    chosen = numbers if isinstance(numbers, range) else frozenset(numbers)
    return [*[chosen] * int(whole), frozenset(drawn.sample(numbers, round(rest * len(numbers))))]


def read_mixture(parts: list[Part], seed: int = 0) -> Iterator[tuple[int, Source]]:
    """Rows of all parts, each with its part's number; parts are spread evenly, hub data sets come last."""
    local, hubs = [], []
    for number, part in enumerate(parts):
        if part.is_hub:
            hubs.append((number, read_hub(part.path, part.cap, seed)))
            continue
        files = find_files(part.path)
        passes = choose_rows(part, count_rows(files), seed)
        local.append((number, _read_passes(files, passes), sum(map(len, passes))))
    read = [0] * len(local)
    for _ in range(sum(total for *_, total in local)):
        # The part that is furthest behind its share.
        turn = min((i for i in range(len(local)) if read[i] < local[i][2]), key=lambda i: (read[i] + 0.5) / local[i][2])
        number, rows, _ = local[turn]
        read[turn] += 1
        for source in rows:
            yield number, source
            if source.last:
                break
    for number, rows in hubs:
        for source in rows:
            yield number, source


def _read_passes(files: list[Path], passes: list[Collection[int]]) -> Iterator[Source]:
    for chosen in passes:
        if chosen:
            yield from read_rows(files, chosen)
