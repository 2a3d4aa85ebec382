"""Token files: uint16 or uint32 numbers, described by a JSON file beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongpatchError

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def is_binary(path: str) -> bool:
    return path.endswith(".bin")


def sidecar(path: str | Path) -> Path:
    """`books.json` for `books.bin`: {dtype, vocabulary, tokens}."""
    return Path(path).with_suffix(".json")


def write_binary(path: str | Path, ids: np.ndarray, tokenizer: Any) -> None:
    """Write token ids `[n]` in the smallest type that holds the vocabulary."""
    vocabulary = len(tokenizer)
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    ids.astype(DTYPES[dtype]).tofile(path)
    described = {"dtype": dtype, "vocabulary": vocabulary, "tokens": len(ids)}
    sidecar(path).write_text(json.dumps(described) + "\n", encoding="utf-8")


def read_binary(path: str | Path, tokenizer: Any) -> np.ndarray:
    """Token ids `[n]` as a memory map.

    Raises:
        LongpatchError: where the file is not what its description says, or was made for another vocabulary.
    """
    try:
        described = json.loads(sidecar(path).read_text(encoding="utf-8"))
        dtype, vocabulary, tokens = described["dtype"], described["vocabulary"], described["tokens"]
        size = Path(path).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} has no usable description {sidecar(path).name}: {error!r}"
        raise LongpatchError("read_binary", [reason], "{dtype, vocabulary, tokens} as JSON") from error
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"{path} says dtype={dtype!r}")
    elif size != tokens * np.dtype(DTYPES[dtype]).itemsize:
        reasons.append(f"{path} has {size} bytes, not {tokens} tokens of {dtype}")
    if vocabulary != len(tokenizer):
        reasons.append(f"{path} was made for {vocabulary} tokens, the tokenizer has {len(tokenizer)}")
    if reasons:
        raise LongpatchError("read_binary", reasons, "uint16 or uint32, and the tokenizer the file was made with")
    return np.memmap(path, dtype=DTYPES[dtype], mode="r")
