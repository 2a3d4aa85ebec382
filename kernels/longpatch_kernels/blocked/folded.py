"""Wide windows: what all of many queries see is left to PyTorch's own CPU kernel, which needs no mask for it.

Of the keys around these, each query sees as many: the older ones its right part, the newer ones its left part. Put side
by side, these two runs of keys are a call with a smaller window.

Shapes: S = batch x key heads of a piece, g query heads a key head, T queries folded together, R of them in a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inputs import LambdaInputs
from .walk import BLOCK_QUERIES, Block, Piece

LEAST_WINDOW = 2048
LEAST_KEYS = 512  # in the middle
ROWS = 768  # of a key head; from so many on the kernel works in tiles of 256 rows, its fastest

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Middle:
    """The result of a piece's queries over the keys that all of them see."""

    out: Tensor  # [S, g, T, d]
    lse: Tensor  # [S, g, T]

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """out [S, g R, d] and lse [S, g R, 1] of one block, as a copy."""
        out, lse = (t[:, :, block.rows].flatten(1, 2).contiguous() for t in (self.out, self.lse))
        return out, lse[..., None]


def suits(x: LambdaInputs) -> bool:
    plain = x.softcap is None and x.alibi_slopes is None and not x.wraps
    return plain and x.window >= LEAST_WINDOW and x.query.device.type == "cpu" and x.query.dtype == torch.float32


def split(piece: Piece) -> Iterator[tuple[Piece, Middle | None]]:
    """The piece in runs of T queries, each with its middle, where it has one."""
    x = piece.x
    if not suits(x):
        yield piece, None
        return
    length, edges = -(-ROWS // (BLOCK_QUERIES * x.group)) * BLOCK_QUERIES, {}
    for start in range(0, x.query_count, length):
        run = Block(piece, slice(start, min(start + length, x.query_count)))
        middle = slice(max(piece.first, run.position + run.count - x.window), run.position)
        if run.count == length and middle.stop - middle.start >= LEAST_KEYS:
            yield _fold(run, middle, edges), _over(run, middle)
        else:
            yield _run(run, x.key[:, :, : run.position + run.count], x.value[:, :, : run.position + run.count]), None


def _over(run: Block, keys: slice) -> Middle:
    query, key, value = run.piece.window
    out, lse = _kernel(run.matrix(query)[None], key[None, :, keys], value[None, :, keys], scale=run.x.scale)
    return Middle(*(t[0].unflatten(1, (run.x.group, run.count)) for t in (out, lse)))


def _run(run: Block, key: Tensor, value: Tensor) -> Piece:
    """These queries alone, their own keys the last of `key`."""
    piece, x, rows = run.piece, run.x, run.rows
    far = x.far
    if far is not None:
        mask = None if far.mask is None else far.mask[:, :, rows]
        far = replace(far, query=far.query[:, :, rows], mask=mask)
    x = replace(x, query=x.query[:, :, rows], key=key, value=value, far=far)
    return replace(piece, x=x, of_queries=(*piece.of_queries, rows))


def _fold(run: Block, middle: slice, edges: dict) -> Piece:
    """These queries against the keys around the middle, in the window that they then have."""
    x, first = run.x, max(run.piece.first, run.position - run.x.window)
    key, value = (
        torch.cat((t[:, :, first : middle.start], t[:, :, middle.stop : run.position + run.count]), dim=2)
        for t in (x.key, x.value)
    )
    made = _run(run, key, value)
    far = made.x.far
    if far is not None:  # their distances as they were, less what the window has lost
        moved = made.x.key_count - run.count - run.position + x.window - run.count
        far = replace(far, given_positions=far.positions + moved)
    return replace(made, x=replace(made.x, window=run.count, far=far), first=0, edges=edges)
