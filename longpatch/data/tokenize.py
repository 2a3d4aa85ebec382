"""Texts become a token file."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import LongpatchError
from .binary import TokenWriter
from .counts import Count, keep, start_counts
from .documents import Encoder, encode
from .mixture import parse_parts, read_mixture
from .settings import DataSection


def tokenize(
    tokenizer: Any, texts: list[str], out: str | Path, workers: int = 1, seed: int = 0, progress: bool = False
) -> list[Count]:
    """Write the tokens of `texts`, one after another, to the file `out`; returns what became of each of them.

    Args:
        texts: as a training configuration's `data.train`; conversations are refused, as their labels would be lost.
        workers: processes that tokenise.

    Raises:
        LongpatchError: naming file and line of what cannot be read; `out` is then as it was.
    """
    out = Path(out)
    if out.suffix != ".bin":
        raise LongpatchError("tokenize", [f"{out} does not end in .bin"])
    if not out.parent.is_dir():
        raise LongpatchError("tokenize", [f"no folder {out.parent}"])
    parts = parse_parts(texts)
    counts = start_counts(parts)
    documents = encode(read_mixture(parts, seed), Encoder(tokenizer, texts_only=True), workers)
    kept = keep(documents, DataSection(train=texts, length=2), counts)
    with TokenWriter(out, tokenizer) as writer, tqdm(unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for document in kept:
            writer.append(document.ids)
            bar.update(len(document.ids))
        if not writer.tokens:
            raise LongpatchError("tokenize", [f"no token in {', '.join(texts)}"])
        writer.counts = [asdict(count) for count in counts]
    return counts
