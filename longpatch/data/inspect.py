"""Rows as the model will see them, for people to look at."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .rows import IGNORED

MARKS = ("⟦", "⟧")
COLOURS = ("\x1b[32m", "\x1b[0m")
SHOWN = 60  # tokens at either end of a stretch


def marked(row: dict[str, Tensor], tokenizer: Any, marks: tuple[str, str] = MARKS) -> str:
    """The text of a row, what is trained between `marks`, the middle of long stretches left out."""
    ids, trained = row["input_ids"], row["labels"] != IGNORED
    parts, start = [], 0
    while start < len(ids):
        changes = (trained[start:] != trained[start]).nonzero()
        stop = start + (int(changes[0]) if len(changes) else len(ids) - start)
        text = _shortened(ids[start:stop], tokenizer)
        parts.append(f"{marks[0]}{text}{marks[1]}" if trained[start] else text)
        start = stop
    return "".join(parts)


def _shortened(ids: Tensor, tokenizer: Any) -> str:
    if len(ids) <= 2 * SHOWN:
        return tokenizer.decode(ids)
    left_out = len(ids) - 2 * SHOWN
    return f"{tokenizer.decode(ids[:SHOWN])} ... {left_out:,} tokens ... {tokenizer.decode(ids[-SHOWN:])}"


def draw_lengths(path: Path, lengths: np.ndarray, row: int) -> None:
    """Histogram of document lengths [D] in tokens, and where rows of `row` tokens end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(max(1, lengths.min()), max(lengths.max(), row) + 1, 40)
    axes.hist(lengths, bins=edges.tolist())
    axes.axvline(row, color="black", linewidth=1, linestyle="--", label=f"a row: {row:,} tokens")
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.legend()
    figure.savefig(path, dpi=120)
