"""How a call is walked: one batch row, a few key heads, blocks of queries, stretches of keys; what each query sees.

Shapes: S key heads of a piece, g query heads a key head, R queries of a block, W keys of a stretch, f far keys. M
blocks are computed at a time: one of each of S heads, or N neighbours of one head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..inputs import LambdaInputs, computing_dtype

SCORE_BYTES = 10 * 2**20  # scores that exist at one time: still in a CPU's last cache
STRETCH_KEYS = 1280  # keys of one query among them
# Queries of a block: more of them score more keys that not all of them see, fewer mean more calls. Measured: best at a
# window of 256 and of 1,024 keys.
BLOCK_QUERIES = 128
ALIGNED = 16  # products into rows of a length that this does not divide took a tenth longer


@dataclass(frozen=True)
class Far:
    """The far segment of a piece."""

    query: Tensor  # [S, g, n, d]
    key: Tensor  # [S, f, d] in the computing dtype, as value
    value: Tensor
    positions: Tensor | None  # [f]; None: 0..f-1
    reach: tuple[int, int] | None  # the least and the largest of them; None where that is not known
    mask: Tensor | None  # [S, g, n, f]
    distance: Tensor | None  # [f]


@dataclass(frozen=True)
class Piece:
    """Some key heads of one batch row."""

    query: Tensor  # [S, g, n, d]
    key: Tensor  # [S, m, d]
    value: Tensor  # [S, m, d]
    far: Far | None
    window: int
    ring_start: int | Tensor | None  # None: in time order
    first: int  # no key in front of it is seen
    first_valid: Tensor | None  # the same as a tensor, where it is not known as a number
    slopes: Tensor | None  # [S, g]
    along: tuple[Tensor, ...] = ()  # whatever else has an axis of queries, [S, g, n, ...]
    along_keys: tuple[Tensor, ...] = ()  # or of keys, [S, m, d] or [S, f, d]
    edges: dict[tuple, Tensor] = field(default_factory=dict)  # masks that blocks share

    @property
    def offset(self) -> int:
        return self.key.shape[1] - self.query.shape[2]

    def one(self, head: int) -> "Piece":
        """One of the key heads."""
        chosen = slice(head, head + 1)
        far = self.far
        if far is not None:
            mask = None if far.mask is None else far.mask[chosen]
            far = replace(far, query=far.query[chosen], key=far.key[chosen], value=far.value[chosen], mask=mask)
        return replace(
            self,
            query=self.query[chosen],
            key=self.key[chosen],
            value=self.value[chosen],
            far=far,
            slopes=None if self.slopes is None else self.slopes[chosen],
            along=tuple(t[chosen] for t in self.along),
            along_keys=tuple(t[chosen] for t in self.along_keys),
        )

    def blocks(self, neighbours: bool = True) -> Iterator["Block"]:
        """One block of each head at a time; where windows are full, if wanted, some neighbours of one head."""
        count = self.query.shape[2]
        full = max(0, self.first + self.window - 1 - self.offset)  # the first query whose window is
        full = min(-(-full // BLOCK_QUERIES) * BLOCK_QUERIES, count)
        several = (count - full) // BLOCK_QUERIES
        if not neighbours or several < 2 or self.ring_start is not None or self.first_valid is not None:
            full, several = count, 0
        for start in range(0, full, BLOCK_QUERIES):
            yield Block(self, slice(start, min(start + BLOCK_QUERIES, full)))
        stop = full + several * BLOCK_QUERIES
        most = self._neighbours()
        for head in range(self.query.shape[0] if several else 0):
            one = self.one(head)
            for start in range(full, stop, most * BLOCK_QUERIES):
                rows = slice(start, min(start + most * BLOCK_QUERIES, stop))
                yield Block(one, rows, (rows.stop - start) // BLOCK_QUERIES)
        if stop < count:
            yield Block(self, slice(stop, count))

    def _neighbours(self) -> int:
        """As many as SCORE_BYTES allows, the same for each thread."""
        keys = min(self.window + BLOCK_QUERIES, STRETCH_KEYS)
        number_bytes = computing_dtype(self.query.dtype).itemsize
        most = SCORE_BYTES // (number_bytes * self.query.shape[1] * BLOCK_QUERIES * keys)
        threads = torch.get_num_threads()
        return max(1, most // threads) * threads


def pieces(x: LambdaInputs, along: Sequence[Tensor] = (), along_keys: Sequence[Tensor] = ()) -> Iterator[Piece]:
    """All of `x`, as many heads at a time as SCORE_BYTES allows.

    With them go tensors [B, Hq, n, ...] and [B, Hkv, m, d] or [B, Hkv, f, d].
    """
    batch, key_heads = x.key.shape[:2]
    group, on_cpu = x.group, x.query.is_cpu
    queries, dtype = min(BLOCK_QUERIES, x.query_count), computing_dtype(x.query.dtype)
    keys = min(x.key_count if x.wraps else queries + min(x.window, x.key_count), STRETCH_KEYS)
    heads = max(1, SCORE_BYTES // (dtype.itemsize * max(1, group * queries * keys)))
    heads = -(-key_heads // -(-key_heads // heads))  # evenly
    padding, first_valid = [0] * batch, x.first_valid
    if first_valid is not None and on_cpu and not x.wraps:
        padding, first_valid = first_valid.clamp(min=0).tolist(), None
    for row in range(batch):
        for start in range(0, key_heads, heads):
            of_keys = row, slice(start, start + heads)
            of_queries = row, slice(start * group, (start + heads) * group)

            def grouped(tensor: Tensor) -> Tensor:
                return tensor[of_queries].unflatten(0, (-1, group))  # noqa: B023 (used at once)

            far = x.far
            if far is not None:
                positions, reach = None, (0, far.key.shape[2] - 1)
                if far.given_positions is not None:
                    positions = far.given_positions[min(row, len(far.given_positions) - 1)]
                    reach = (int(positions.min()), int(positions.max())) if on_cpu else None
                far = Far(
                    query=grouped(far.query),
                    key=far.key[of_keys].to(dtype),
                    value=far.value[of_keys].to(dtype),
                    positions=positions,
                    reach=reach,
                    mask=None if far.mask is None else grouped(far.mask),
                    distance=None if far.distance is None else far.distance[min(row, len(far.distance) - 1)],
                )
            yield Piece(
                query=grouped(x.query),
                key=x.key[of_keys],
                value=x.value[of_keys],
                far=far,
                window=x.window,
                ring_start=x.ring_start if x.wraps else None,
                first=padding[row],
                first_valid=None if first_valid is None else first_valid[row],
                slopes=None if x.alibi_slopes is None else x.alibi_slopes[of_queries[1]].view(-1, group),
                along=tuple(map(grouped, along)),
                along_keys=tuple(t[of_keys] for t in along_keys),
            )


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
        if self.group == 1:
            rows = (
                grouped[:, 0, self.rows] if self.count == 1 else grouped[0, 0, self.rows].unflatten(0, (-1, self.size))
            )
        else:
            rows = self.target(grouped).flatten(1, 2)
        return rows.to(computing_dtype(rows.dtype))

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
