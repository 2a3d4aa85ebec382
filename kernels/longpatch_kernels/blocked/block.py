"""One block of queries, or some of them: its tensors, the stretches of keys that it sees, and what each query sees.

Shapes: S key heads of a piece, g query heads a key head, R queries of a block, W keys of a stretch, f far keys. M
blocks are computed at a time: one of each of S heads, or neighbours of one head.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import computing_dtype
from .pieces import BLOCK_QUERIES, STRETCH_KEYS, Far, Piece, blocks_at_a_time

ALIGNED = 16  # products into rows of a length that this does not divide took a tenth longer


class Block:
    """Queries `rows` of a piece: one block of each of its heads, or `count` blocks of its only head.

    The heads of a group are rows of one matrix: [M, g R, d].
    """

    def __init__(self, piece: Piece, rows: slice, count: int = 1):
        self.piece, self.rows, self.count = piece, rows, count
        self.group = piece.query.shape[1]
        self.size = (rows.stop - rows.start) // count  # R
        self.position = rows.start + piece.offset  # of the first query

    def matrix(self, grouped: Tensor) -> Tensor:
        """These rows of `[S, g, n, ...]` as `[M, g R, ...]` in the computing dtype."""
        return self.target(grouped).flatten(1, 2).to(computing_dtype(grouped.dtype))

    def target(self, grouped: Tensor) -> Tensor:
        """These rows of `[S, g, n, ...]` as a writable `[M, g, R, ...]`."""
        if self.count == 1:
            return grouped[:, :, self.rows]
        return grouped[0, :, self.rows].unflatten(1, (-1, self.size)).transpose(0, 1)

    def apart(self, matrix: Tensor) -> Tensor:
        """`[M, g R, W]` as `[M, g, R, W]`."""
        return matrix.view(-1, self.group, self.size, matrix.shape[-1])

    def keys(self, tensor: Tensor, stretch: slice) -> Tensor:
        """`[S, m, d]` as `[M, W, d]`, overlapping where blocks are neighbours, in the computing dtype.

        `stretch` is the first block's.
        """
        dtype = computing_dtype(tensor.dtype)
        if self.count == 1:
            return tensor[:, stretch].to(dtype)
        behind = (self.count - 1) * self.size
        part = tensor[0, stretch.start : stretch.stop + behind].to(dtype)
        token, number = part.stride()
        return part.as_strided((self.count, part.shape[0] - behind, part.shape[1]), (self.size * token, token, number))

    def shared(self, tensor: Tensor) -> Tensor:
        """`[S, f, d]` as `[M, f, d]`."""
        return tensor if self.count == 1 else tensor.expand(self.count, -1, -1)

    def add_to_keys(self, target: Tensor, stretch: slice, left: Tensor, right: Tensor):
        """Add `left.mT @ right` [M, W, d] to the keys of `[S, m, d]` that it belongs to."""
        if self.count == 1:
            target[:, stretch].baddbmm_(left.mT, right)
            return
        for index, part in enumerate(torch.bmm(left.mT, right)):
            target[0, stretch.start + index * self.size : stretch.stop + index * self.size].add_(part)

    def add_to_shared(self, target: Tensor, left: Tensor, right: Tensor):
        """The same for `[S, f, d]`."""
        if self.count == 1:
            target.baddbmm_(left.mT, right)
        else:
            target[0].add_(torch.bmm(left.mT, right).sum(dim=0))

    def stretches(self) -> Iterator[slice]:
        """The keys that the first block sees, STRETCH_KEYS at a time at most; some before, where that aligns them."""
        piece, first, stop = self.piece, 0, self.piece.key.shape[1]
        if piece.ring_start is None:
            first, stop = max(piece.first, self.position - piece.window + 1), self.position + self.size
        if first >= stop:
            return
        first = max(piece.first, stop - -(-(stop - first) // ALIGNED) * ALIGNED)
        even = (stop - first) / -(-(stop - first) // STRETCH_KEYS)
        step = math.ceil(even / ALIGNED) * ALIGNED
        for start in range(first, stop, step):
            yield slice(start, min(start + step, stop))

    def hide(self, scores: Tensor, stretch: slice):
        """Window scores [M, g R, W] become -inf where a key is not seen: at its edges, where nothing else is hidden."""
        apart, piece = self.apart(scores), self.piece
        if piece.ring_start is not None or piece.first_valid is not None:
            apart.masked_fill_(self._unseen(stretch), -torch.inf)
            return
        start, stop = stretch.start - self.position, stretch.stop - self.position
        # all queries see keys from the oldest one of the last to that of the first
        for low, high in ((start, min(stop, self.size - piece.window)), (max(start, 1), stop)):
            if low < high:
                apart[..., low - start : high - start].add_(self._edge(low, high, scores))

    def _edge(self, low: int, high: int, like: Tensor) -> Tensor:
        """[R, high - low]: 0, or -inf where a key that many tokens behind the first query is not seen."""
        key = low, high, self.size
        if key not in self.piece.edges:
            index = torch.arange(low, high, device=like.device)
            distance = torch.arange(self.size, device=like.device)[:, None] - index
            unseen = (distance < 0) | (distance >= self.piece.window)
            self.piece.edges[key] = like.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return self.piece.edges[key]

    def _index(self, stretch: slice) -> Tensor:
        """[W], positions of keys."""
        index = torch.arange(stretch.start, stretch.stop, device=self.piece.query.device)
        start = self.piece.ring_start
        return index if start is None else (index - start) % self.piece.key.shape[1]

    def distance(self, stretch: slice) -> Tensor:
        """[R, W], of each query from each key."""
        position = torch.arange(self.position, self.position + self.size, device=self.piece.query.device)
        return position[:, None] - self._index(stretch)

    def _unseen(self, stretch: slice) -> Tensor:
        """[R, W]"""
        distance = self.distance(stretch)
        hidden = (distance < 0) | (distance >= self.piece.window)
        return hidden if self.piece.first_valid is None else hidden | (self._index(stretch) < self.piece.first_valid)

    def sees_far(self) -> bool:
        """Whether one of these queries sees a far key, as far as that is known."""
        far = self.piece.far
        if far is None or far.reach is None:
            return far is not None
        return self.position + self.count * self.size - 1 - far.reach[0] >= self.piece.window

    def hide_far(self, scores: Tensor, far: Far):
        """Far scores [M, g R, f] become -inf where a far key is not seen."""
        if far.mask is None and far.reach is not None and self.position - far.reach[1] >= self.piece.window:
            return
        positions = far.positions
        if positions is None:
            positions = torch.arange(scores.shape[-1], device=scores.device)
        position = torch.arange(self.position, self.position + self.count * self.size, device=scores.device)
        hidden = position.view(self.count, 1, self.size, 1) - positions < self.piece.window
        if far.mask is not None:
            hidden = hidden | ~self.target(far.mask)
        self.apart(scores).masked_fill_(hidden, -torch.inf)


def blocks(piece: Piece, neighbours: bool = True) -> Iterator[Block]:
    """One block of each head at a time; where windows are full, if wanted, some neighbours of one head."""
    count = piece.query.shape[2]
    full = max(0, piece.first + piece.window - 1 - piece.offset)  # the first query whose window is
    full = min(-(-full // BLOCK_QUERIES) * BLOCK_QUERIES, count)
    several = (count - full) // BLOCK_QUERIES
    if not neighbours or several < 2 or piece.ring_start is not None or piece.first_valid is not None:
        full, several = count, 0
    for start in range(0, full, BLOCK_QUERIES):
        yield Block(piece, slice(start, min(start + BLOCK_QUERIES, full)))
    stop = full + several * BLOCK_QUERIES
    step = _neighbours(piece, max(1, several)) * BLOCK_QUERIES
    for head in range(piece.query.shape[0] if several else 0):
        one = piece.one(head)
        for start in range(full, stop, step):
            rows = slice(start, min(start + step, stop))
            yield Block(one, rows, (rows.stop - start) // BLOCK_QUERIES)
    if stop < count:
        yield Block(piece, slice(stop, count))


def _neighbours(piece: Piece, several: int) -> int:
    """How many of `several` at a time: what SCORE_BYTES allows, evenly, and the same number for each thread."""
    keys, dtype, threads = piece.window + BLOCK_QUERIES, computing_dtype(piece.query.dtype), torch.get_num_threads()
    most = max(1, blocks_at_a_time(piece.query.shape[1], BLOCK_QUERIES, keys, dtype) // threads) * threads
    even = several / -(-several // most)
    return math.ceil(even / threads) * threads
