"""The tokens of a mixture in files, read by memory map: kept in a cache, or for one run."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .binary import TokenWriter, read_binary, sidecar
from .counts import Count, keep, start_counts
from .documents import Document, Encoder, encode
from .mixture import Part, read_mixture
from .settings import DataSection
from .sources import find_files
from .tokens import fingerprint

FORMAT = 2


class Store(NamedTuple):
    """Token ids [N], whether each is trained [N], the ends of documents among them [D]; what became of the others.

    `long` [L] are tokens of the conversations that are left out for their length.
    """

    tokens: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    long: np.ndarray
    counts: list[Count]


def open_store(parts: list[Part], section: DataSection, tokenizer: Any) -> Store:
    """The tokens of `parts`: from the cache that `section` names if they are there, otherwise made now."""
    encoder = Encoder(tokenizer, section.template)
    if section.cache is None or any(part.is_hub for part in parts):
        with tempfile.TemporaryDirectory(prefix="longpatch-", ignore_cleanup_errors=True) as folder:
            _write(Path(folder), parts, section, encoder)
            return _read(Path(folder), tokenizer)  # mapped files outlive their names
    cache = Path(section.cache).expanduser()
    folder = cache / _key(parts, section, encoder)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as unfinished:
            new = Path(unfinished) / "store"
            new.mkdir()
            _write(new, parts, section, encoder)
            try:
                new.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return _read(folder, tokenizer)


def _key(parts: list[Part], section: DataSection, encoder: Encoder) -> str:
    """Of the content of all files and of every setting that tokens depend on."""
    content = [
        [part.name, part.cap, part.weight, [[file.name, _digest(file)] for file in find_files(part.path)]]
        for part in parts
    ]
    settings = [section.room, section.min_length, section.pack, section.seed]
    tokenizer = encoder.tokens.tokenizer
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # templates write them
    key = [FORMAT, content, settings, encoder.template, fingerprint(tokenizer), sorted(named.items())]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, parts: list[Part], section: DataSection, encoder: Encoder) -> None:
    counts = start_counts(parts)
    documents = encode(read_mixture(parts, section.seed), encoder, section.workers)
    with (
        TokenWriter(folder / "tokens.bin", encoder.tokens.tokenizer) as writer,
        (folder / "trained").open("wb") as marks,
    ):
        long: list[int] = []
        ends = _append(keep(documents, section, counts, long), writer, marks)
        writer.counts = [asdict(count) for count in counts]
    for name, numbers in (("ends", ends), ("long", long)):
        np.save(folder / f"{name}.npy", np.asarray(numbers, dtype=np.int64))


def _append(documents: Iterable[Document], writer: TokenWriter, marks: Any) -> list[int]:
    ends = []
    for document in documents:
        writer.append(document.ids)
        trained = document.trained
        (np.ones(len(document.ids), dtype=bool) if trained is None else trained).tofile(marks)
        if document.last:
            ends.append(writer.tokens)
    return ends


def _read(folder: Path, tokenizer: Any) -> Store:
    path = folder / "tokens.bin"
    counts = [Count(**count) for count in json.loads(sidecar(path).read_text(encoding="utf-8"))["counts"]]
    ends, long = (np.load(folder / f"{name}.npy") for name in ("ends", "long"))
    if not len(ends):
        return Store(np.empty(0, dtype=np.uint16), np.empty(0, dtype=bool), ends, long, counts)
    trained = np.memmap(folder / "trained", dtype=bool, mode="r")
    return Store(read_binary(path, tokenizer), trained, ends, long, counts)
