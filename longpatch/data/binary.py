"""Token files: uint16 or uint32 numbers, described by a JSON file beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongpatchError
from .tokens import fingerprint

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
CHECKED = 2**24  # tokens that are looked at in one go
SUPPORTED = "uint16 or uint32, and the tokenizer that the file was made with"
DESCRIBED = {"dtype": str, "vocabulary": int, "tokenizer": str, "tokens": int}


def is_binary(path: str) -> bool:
    return path.endswith(".bin")


def sidecar(path: str | Path) -> Path:
    """`books.json` for `books.bin`: {dtype, vocabulary, tokenizer, tokens, counts}."""
    return Path(path).with_suffix(".json")


class TokenWriter:
    """Writes a token file, in the smallest type that holds the vocabulary; nothing is left of one that fails::

        with TokenWriter(path, tokenizer) as writer:
            writer.append(ids)

    `counts` is plain data that the description keeps.

    Raises:
        LongpatchError: where a file that describes no tokens has the description's name.
    """

    def __init__(self, path: str | Path, tokenizer: Any):
        self.path, self.vocabulary = Path(path), vocabulary_of(tokenizer)
        self.tokenizer = fingerprint(tokenizer)
        self.dtype = "uint16" if self.vocabulary <= 2**16 else "uint32"
        self.tokens = 0
        self.counts: Any = None
        self._unfinished = self.path.with_suffix(".bin.unfinished")
        beside = sidecar(self.path)
        if beside.exists() and not _describes_tokens(beside):
            reason = f"{beside} exists and describes no tokens, so it is not written over"
            raise LongpatchError("tokenize", [reason], "another name")

    def __enter__(self) -> "TokenWriter":
        self._file = self._unfinished.open("wb")
        return self

    def append(self, ids: np.ndarray) -> None:
        """Token ids `[n]`."""
        ids.astype(DTYPES[self.dtype]).tofile(self._file)
        self.tokens += len(ids)

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._file.close()
        if kind is not None:
            self._unfinished.unlink()
            return
        described = {
            "dtype": self.dtype,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
            "counts": self.counts,
        }
        sidecar(self.path).unlink(missing_ok=True)
        self._unfinished.replace(self.path)
        sidecar(self.path).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def vocabulary_of(tokenizer: Any) -> int:
    """Ids are less than this; some tokenizers leave numbers out, so that it is more than they have tokens."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def write_binary(path: str | Path, ids: np.ndarray, tokenizer: Any) -> None:
    """Write token ids `[n]`."""
    with TokenWriter(path, tokenizer) as writer:
        writer.append(ids)


def read_binary(path: str | Path, tokenizer: Any, described: bool = True) -> np.ndarray:
    """Token ids `[n]` as a memory map.

    Args:
        described: refuse a file with no description beside it; otherwise that is taken for uint16, where those
            hold the vocabulary.

    Raises:
        LongpatchError: where the file is not what its description says, was made with another tokenizer, or holds an
            id that is none of the vocabulary.
    """
    path, vocabulary = Path(path), vocabulary_of(tokenizer)
    if not described and path.is_file() and not sidecar(path).exists():
        if vocabulary > 2**16:
            reason = f"{path} has no description {sidecar(path).name}, and uint16 does not hold {vocabulary} tokens"
            raise LongpatchError("data", [reason], SUPPORTED)
        description: dict[str, Any] = {"dtype": "uint16"}
    else:
        description = _description(path)
    dtype = description["dtype"]
    reasons = []
    if dtype not in DTYPES:
        raise LongpatchError("data", [f"{path} says dtype={dtype!r}"], SUPPORTED)
    size, width = path.stat().st_size, np.dtype(DTYPES[dtype]).itemsize
    tokens = description.get("tokens", size // width)
    if size != tokens * width:
        reasons.append(f"{path} has {size} bytes, not {tokens} tokens of {dtype}")
    if description.get("vocabulary", vocabulary) != vocabulary:
        reasons.append(f"{path} was made for {description['vocabulary']} tokens, the tokenizer has {vocabulary}")
    elif "tokenizer" in description and description["tokenizer"] != fingerprint(tokenizer):
        reasons.append(f"{path} was made with another tokenizer")
    if not reasons and not size:
        reasons.append(f"{path} is empty")
    if reasons:
        raise LongpatchError("data", reasons, SUPPORTED)
    ids = np.memmap(path, dtype=DTYPES[dtype], mode="r")
    for start in range(0, len(ids), CHECKED):
        largest = int(ids[start : start + CHECKED].max())
        if largest >= vocabulary:
            raise LongpatchError("data", [f"{path} holds the id {largest} of a vocabulary of {vocabulary}"], SUPPORTED)
    return ids


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(sidecar(path).read_text(encoding="utf-8"))
        wrong = [name for name, kind in DESCRIBED.items() if not isinstance(description[name], kind)]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} is none")
        path.stat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} has no usable description {sidecar(path).name}: {error!r}"
        raise LongpatchError("data", [reason], f"{{{', '.join(DESCRIBED)}}} as JSON") from error
    return description


def _describes_tokens(path: Path) -> bool:
    try:
        return set(DESCRIBED) <= set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
