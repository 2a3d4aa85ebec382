"""Wide windows: what all of many queries see is left to PyTorch's own CPU kernel, which needs no mask for it.

Of the keys around these, each query sees as many: the older ones its right part, the newer ones its left part. Put side
by side, these two runs of keys are a call with a smaller window.

Shapes: S key heads of a piece, g query heads a key head, T queries folded together.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..inputs import LambdaInputs
from .block import Block
from .causal import kernel
from .pieces import BLOCK_QUERIES, Piece

LEAST_WINDOW = 2048
LEAST_KEYS = 512  # in the middle
ROWS = 768  # of a key head; from so many on the kernel works in tiles of 256 rows, its fastest


def suits(x: LambdaInputs) -> bool:
    plain = x.softcap is None and x.alibi_slopes is None and not x.wraps
    return plain and x.window >= LEAST_WINDOW and x.query.is_cpu and x.query.dtype == torch.float32


def split(piece: Piece, scale: float) -> Iterator[Piece]:
    """The piece in runs of T queries, where it can be folded.

    Such a run has out [S, g, T, d] and lse [S, g, T, 1] over its middle, the keys that all of it see, as the last two
    of `along`.
    """
    group, count = piece.query.shape[1:3]
    length, edges, start = -(-ROWS // (BLOCK_QUERIES * group)) * BLOCK_QUERIES, {}, 0
    while start < count:
        run = Block(piece, slice(start, min(start + length, count)))
        middle = slice(max(piece.first, run.position + run.size - piece.window), run.position)
        if run.size == length and middle.stop - middle.start >= LEAST_KEYS:
            made = _fold(run, middle, edges)
            yield replace(made, along=(*made.along, *_over(run, middle, scale)))
        else:
            stop = run.position + run.size
            yield _run(run, piece.key[:, :stop], piece.value[:, :stop])
        start = run.rows.stop


def _over(run: Block, keys: slice, scale: float) -> tuple[Tensor, Tensor]:
    piece = run.piece
    out, lse = kernel(run.matrix(piece.query)[None], piece.key[None, :, keys], piece.value[None, :, keys], scale=scale)
    return out[0].unflatten(1, (run.group, -1)), lse[0, ..., None].unflatten(1, (run.group, -1))


def _run(run: Block, key: Tensor, value: Tensor) -> Piece:
    """These queries alone, their own keys the last of `key`."""
    piece, rows, far = run.piece, run.rows, run.piece.far
    if far is not None:
        far = replace(far, query=far.query[:, :, rows], mask=None if far.mask is None else far.mask[:, :, rows])
    along = tuple(t[:, :, rows] for t in piece.along)
    return replace(piece, query=piece.query[:, :, rows], key=key, value=value, far=far, along=along)


def _fold(run: Block, middle: slice, edges: dict) -> Piece:
    """These queries against the keys around the middle, in the window that they then have."""
    piece, count = run.piece, run.size
    first = max(piece.first, run.position - piece.window)
    around = slice(first, middle.start), slice(middle.stop, run.position + count)
    key, value = (torch.cat([t[:, part] for part in around], dim=1) for t in (piece.key, piece.value))
    made = _run(run, key, value)
    far = made.far
    if far is not None:  # their distances as they were, less what the window has lost
        moved = made.offset - run.position + piece.window - count
        positions = torch.arange(far.key.shape[1]) if far.positions is None else far.positions
        least, largest = far.reach or (0, 0)
        far = replace(far, positions=positions + moved, reach=far.reach and (least + moved, largest + moved))
    return replace(made, window=count, far=far, first=0, edges=edges)
