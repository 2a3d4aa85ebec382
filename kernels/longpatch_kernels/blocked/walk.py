"""How a call is walked: a few heads at a time, blocks of their queries, stretches of keys; and what each query sees.

Shapes: b batch rows and Hkv key heads of a piece, S = b x Hkv, g query heads a key head, R queries of a block, W keys
of a stretch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..inputs import FarSegment, LambdaInputs, computing_dtype

SCORE_BYTES = 10 * 2**20  # scores that exist at one time: still in a CPU's last cache
STRETCH_KEYS = 1280  # keys of one query among them
# Queries of a block: more of them score more keys that not all of them see, fewer mean more calls. Measured: best at a
# window of 256 and of 1,024 keys.
BLOCK_QUERIES = 128
ALIGNED = 16  # products into rows of a length that this does not divide took a tenth longer

Slices = tuple[slice, ...]


def in_order(x: LambdaInputs) -> LambdaInputs:
    """The ring unrolled, unless one block reads all of it anyway."""
    return x if x.query_count <= BLOCK_QUERIES else x.in_time_order()


@dataclass(frozen=True)
class Piece:
    """Some batch rows and key heads of a call, and where they are in its tensors."""

    x: LambdaInputs  # of these alone
    of_queries: Slices  # in tensors [B, Hq, n, ...]
    of_keys: Slices  # in tensors [B, Hkv, ...]
    first: int  # no key in front of it is seen
    edges: dict[tuple, Tensor] = field(default_factory=dict)  # masks that blocks share

    def blocks(self) -> Iterator["Block"]:
        for start in range(0, self.x.query_count, BLOCK_QUERIES):
            yield Block(self, slice(start, min(start + BLOCK_QUERIES, self.x.query_count)))

    def grouped(self, tensor: Tensor) -> Tensor:
        """`[b, Hq, n, ...]` as `[S, g, n, ...]`."""
        return tensor.reshape(-1, self.x.group, *tensor.shape[2:])

    def targets(self, tensor: Tensor) -> Tensor:
        """This piece of `[B, Hq, n, ...]` as a writable `[b, Hkv, g, n, ...]`."""
        return tensor[self.of_queries].unflatten(1, (-1, self.x.group))

    @cached_property
    def window(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, g, n, d], keys and values [S, m, d]."""
        return self.grouped(self.x.query), self.x.key.flatten(0, 1), self.x.value.flatten(0, 1)

    @cached_property
    def far(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the far segment, whose few keys and values are in the computing dtype."""
        far = self.x.far
        assert far is not None
        key, value = (t.flatten(0, 1).to(computing_dtype(t.dtype)) for t in (far.key, far.value))
        return self.grouped(far.query), key, value


def pieces(x: LambdaInputs) -> Iterator[Piece]:
    """All of `x`: as many heads at a time as SCORE_BYTES allows, of several batch rows where that copies no keys."""
    batch, key_heads = x.key.shape[:2]
    queries, number_bytes = min(BLOCK_QUERIES, x.query_count), computing_dtype(x.query.dtype).itemsize
    keys = min(x.key_count if x.wraps else queries + min(x.window, x.key_count), STRETCH_KEYS)
    heads = max(1, SCORE_BYTES // (number_bytes * max(1, x.group * queries * keys)))
    padding = [0] * batch
    if x.first_valid is not None and x.query.device.type == "cpu" and not x.wraps:
        padding = x.first_valid.clamp(min=0).tolist()
        x = replace(x, first_valid=None)
    together = all(t.stride(0) == key_heads * t.stride(1) for t in (x.key, x.value)) and not any(padding)
    rows = max(1, heads // key_heads) if together else 1
    heads = -(-key_heads // -(-key_heads // heads))  # evenly
    for row in range(0, batch, rows):
        for head in range(0, key_heads, heads):
            of_keys = slice(row, row + rows), slice(head, head + heads)
            of_queries = of_keys[0], slice(head * x.group, (head + heads) * x.group)
            yield Piece(_narrowed(x, of_queries, of_keys), of_queries, of_keys, padding[row])


def _narrowed(x: LambdaInputs, of_queries: Slices, of_keys: Slices) -> LambdaInputs:
    """The same call for some batch rows and key heads."""
    rows, heads = of_queries

    def per_row(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) == 1 else tensor[rows]

    far = x.far and FarSegment(
        query=x.far.query[of_queries],
        key=x.far.key[of_keys],
        value=x.far.value[of_keys],
        given_positions=per_row(x.far.given_positions),
        mask=None if x.far.mask is None else x.far.mask[of_queries],
        distance=per_row(x.far.distance),
    )
    return replace(
        x,
        query=x.query[of_queries],
        key=x.key[of_keys],
        value=x.value[of_keys],
        far=far,
        first_valid=None if x.first_valid is None else x.first_valid[rows],
        alibi_slopes=None if x.alibi_slopes is None else x.alibi_slopes[heads],
    )


class Block:
    """Queries `rows` of a piece. The heads of a group are rows of one matrix, [S, g R, d]."""

    def __init__(self, piece: Piece, rows: slice):
        self.piece, self.rows, self.x, self.group = piece, rows, piece.x, piece.x.group
        self.count = rows.stop - rows.start
        self.position = rows.start + self.x.key_count - self.x.query_count  # of the first query

    def matrix(self, grouped: Tensor) -> Tensor:
        """These rows of `[S, g, n, ...]` as `[S, g R, ...]` in the computing dtype."""
        rows = grouped[:, 0, self.rows] if self.group == 1 else grouped[:, :, self.rows].flatten(1, 2)
        return rows.to(computing_dtype(rows.dtype))

    def target(self, targets: Tensor) -> Tensor:
        """These rows of `[b, Hkv, g, n, ...]`."""
        return targets[:, :, :, self.rows]

    def apart(self, matrix: Tensor) -> Tensor:
        """`[S, g R, W]` as `[b, Hkv, g, R, W]`."""
        return matrix.view(self.x.query.shape[0], -1, self.group, self.count, matrix.shape[-1])

    def stretches(self) -> Iterator[slice]:
        """The keys that these queries see, STRETCH_KEYS at a time at most; and some before, where that aligns them."""
        first = 0 if self.x.wraps else max(self.piece.first, self.position - self.x.window + 1)
        stop = self.x.key_count if self.x.wraps else self.position + self.count
        if first >= stop:
            return
        first = max(self.piece.first, stop - -(-(stop - first) // ALIGNED) * ALIGNED)
        even = (stop - first) / -(-(stop - first) // STRETCH_KEYS)
        step = math.ceil(even / ALIGNED) * ALIGNED
        for start in range(first, stop, step):
            yield slice(start, min(start + step, stop))

    def hide(self, scores: Tensor, stretch: slice):
        """Window scores [S, g R, W] become -inf where a key is not seen: at its edges, where nothing else is hidden."""
        apart, x = self.apart(scores), self.x
        if x.wraps or x.first_valid is not None:
            apart.masked_fill_(self._unseen(stretch), -torch.inf)
            return
        start, stop = stretch.start - self.position, stretch.stop - self.position
        # all queries see keys from the oldest one of the last to that of the first
        for low, high in ((start, min(stop, self.count - x.window)), (max(start, 1), stop)):
            if low < high:
                apart[..., low - start : high - start].add_(self._edge(low, high, scores))

    def _edge(self, low: int, high: int, like: Tensor) -> Tensor:
        """[R, high - low]: 0, or -inf where a key that many tokens behind the first query is not seen."""
        key = low, high, self.count
        if key not in self.piece.edges:
            index = torch.arange(low, high, device=like.device)
            distance = torch.arange(self.count, device=like.device)[:, None] - index
            unseen = (distance < 0) | (distance >= self.x.window)
            self.piece.edges[key] = like.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return self.piece.edges[key]

    def distance(self, stretch: slice) -> Tensor:
        """[R, W], of each query from each key."""
        device = self.x.query.device
        index = self.x.time_index(torch.arange(stretch.start, stretch.stop, device=device))
        return torch.arange(self.position, self.position + self.count, device=device)[:, None] - index

    def _unseen(self, stretch: slice) -> Tensor:
        """[1 or b, 1, 1, R, W]"""
        distance, x = self.distance(stretch), self.x
        hidden = ((distance < 0) | (distance >= x.window))[None, None, None]
        if x.first_valid is None:
            return hidden
        index = x.time_index(torch.arange(stretch.start, stretch.stop, device=distance.device))
        return hidden | (index < x.first_valid[:, None, None, None, None])

    def sees_far(self) -> bool:
        """Whether one of these queries sees a far key; on another device than the CPU, whether there are any."""
        x = self.x
        if x.far is None or x.query.device.type != "cpu":
            return x.far is not None
        return self.position + self.count - 1 - x.far.oldest >= x.window

    def hide_far(self, scores: Tensor, far: FarSegment):
        """Far scores [S, g R, f] become -inf where a far key is not seen."""
        given = far.given_positions
        if far.mask is None and scores.device.type == "cpu":
            latest = scores.shape[-1] - 1 if given is None else int(given.max())
            if self.position - latest >= self.x.window:
                return
        position = torch.arange(self.position, self.position + self.count, device=scores.device)[:, None]
        hidden = (position - far.positions[:, None, :] < self.x.window)[:, None, None]
        if far.mask is not None:
            hidden = hidden | ~self.target(far.mask.unflatten(1, (-1, self.group)))
        self.apart(scores).masked_fill_(hidden, -torch.inf)
