"""Which queries and keys meet in one call of the kernel, and how `[B, H, n, d]` tensors are viewed for it.

Shapes: S = batch x key heads, g query heads a key head, N blocks in one call, R queries a block, W keys a band.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inputs import LambdaInputs

BLOCK_QUERIES = (64, 96, 128, 192)
WIDE_ROWS = 192  # from so many rows on, the kernel works in tiles of 64 rows instead of 32
NARROW_COST = 1.27  # measured: time per score in 32-row tiles over 64-row tiles
TALL_ROWS = 768  # and from here on in tiles of 256, 15 % faster still
FOLDED_WINDOW = 2048  # from here on blocks are tall, and what not all of their queries see is folded
CALL_BYTES = 4 * 2**20  # output of one call: still in cache when the far segment is merged into it


@dataclass(frozen=True)
class Band:
    """N blocks of R queries, each against W consecutive keys that start R later than the block before's.

    Some bands are the second of two over the same queries. The first takes the keys that all of its queries see,
    without a mask. Of the keys around these, each query sees as many: the older ones its right part, the newer ones its
    left part. Put side by side, these two runs of keys are a band of a smaller window.
    """

    batch: int
    group: int
    count: int
    rows: slice  # of all N blocks' queries
    position: int  # of the first query
    first_key: int
    width: int
    mask: Tensor | None  # [g R, W], 0 or -inf
    runs: tuple[slice, ...] = ()  # of a second band: `first_key` counts within these

    @property
    def block(self) -> int:
        return (self.rows.stop - self.rows.start) // self.count

    @property
    def last_position(self) -> int:
        return self.position + self.rows.stop - self.rows.start - 1

    def as_one_block(self) -> "Band":
        """The same queries with no boundaries between them, against keys that all of them share."""
        return replace(self, count=1)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """`[B, Hq, N R, ...]` as `[N, S, g R, ...]`: copies only grouped heads, or a batch of transposed heads."""
        blocks = tensor.unflatten(2, (self.count, self.block)).movedim(2, 0)  # [N, B, Hq, R, ...]
        return blocks.reshape(self.count, -1, self.group * self.block, *tensor.shape[3:])

    def queries(self, tensor: Tensor) -> Tensor:
        """This band's rows of `[B, Hq, n, ...]` as `[N, S, g R, ...]`."""
        return self.of_rows(tensor[:, :, self.rows])

    def view(self, tensor: Tensor) -> Tensor:
        """This band's rows of `[B, Hq, n, ...]` as a writable `[N, B, Hkv, g, R, ...]`."""
        part = tensor[:, :, self.rows].unflatten(2, (self.count, self.block)).unflatten(1, (-1, self.group))
        return part.movedim(3, 0)

    def split(self, tensor: Tensor) -> Tensor:
        """`[N, S, g R, ...]` as `[N, B, Hkv, g, R, ...]`."""
        return tensor.unflatten(2, (self.group, self.block)).unflatten(1, (self.batch, -1))

    def keys(self, tensor: Tensor) -> Tensor:
        """Overlapping `[N, S, W, d]` of `[B, Hkv, m, d]`."""
        flat = tensor.flatten(0, 1)
        if self.runs:
            flat = torch.cat([flat[:, run] for run in self.runs], dim=1)
        flat = flat[:, self.first_key :]
        head, token, dim = flat.stride()
        size = (self.count, flat.shape[0], self.width, flat.shape[2])
        return flat.as_strided(size, (self.block * token, head, token, dim))

    def shared(self, tensor: Tensor) -> Tensor:
        """`[B, Hkv, f, d]` as `[N, S, f, d]`, the same for every block."""
        return tensor.flatten(0, 1)[None].expand(self.count, -1, -1, -1)

    def add_to_keys(self, target: Tensor, grads: Tensor):
        """Add `[N, S, W, d]` to the keys `[B, Hkv, m, d]` they belong to."""
        if self.runs:
            lengths = [run.stop - run.start for run in self.runs]
            both = target.new_zeros(*target.shape[:2], sum(lengths), target.shape[3])
            replace(self, runs=()).add_to_keys(both, grads)
            for run, part in zip(self.runs, both.split(lengths, dim=2), strict=True):
                target[:, :, run] += part
            return
        for index, grad in enumerate(grads):
            first = self.first_key + index * self.block
            target[:, :, first : first + self.width] += grad.unflatten(0, target.shape[:2])


def block_queries(window: int, group: int) -> int:
    """Queries per block: least time per query, which scores window + block keys, in tiles of 32 or 64 rows."""

    def cost(queries: int) -> float:
        return (window + queries) * (1.0 if queries * group >= WIDE_ROWS else NARROW_COST)

    return min(BLOCK_QUERIES, key=cost)


def bands(x: LambdaInputs, in_backward: bool = False) -> Iterator[Band]:
    """All queries of `x` in order: growing blocks until the window is full, then N at a time, then a shorter one.

    With more queries than keys the first ones have no keys at all (left padding was cut off): a band of width 0.
    """
    batch, heads, queries, dim = x.query.shape
    offset, window = x.key_count - queries, min(x.window, max(1, x.key_count))
    size = block_queries(window, x.group)
    mask = _mask(size, window)
    tall = -(-TALL_ROWS // (size * x.group)) * size
    if in_backward:  # its threads share out [N, S] and its key gradients take N bands
        most = -(-2 * torch.get_num_threads() // (batch * x.key.shape[1]))
    else:
        most = max(1, CALL_BYTES // (batch * heads * size * dim * x.query.element_size()))
    start = max(0, -offset)
    if start:
        yield Band(batch, x.group, 1, slice(0, start), offset, 0, 0, None)
    while start < queries:
        position, block = start + offset, min(size, queries - start)
        cut = max(0, window - 1 - position)  # columns before the first key
        if cut == 0 and window >= FOLDED_WINDOW and queries - start >= tall:
            yield from _two_bands(x, slice(start, start + tall), size)
            start += tall
            continue
        count = min(most, (queries - start) // size) if cut == 0 and block == size else 1
        part = mask[:block, cut : window - 1 + block]
        part = part.repeat(x.group, 1) if x.group > 1 else part
        rows = slice(start, start + count * block)
        yield Band(batch, x.group, count, rows, position, position - window + 1 + cut, part.shape[1], part)
        start = rows.stop


def _two_bands(x: LambdaInputs, rows: slice, size: int) -> Iterator[Band]:
    """One tall block against the keys that all of it sees, then blocks of `size` against the two runs around these."""
    tall, position = rows.stop - rows.start, rows.start + x.key_count - x.query_count
    oldest = position - x.window + 1
    yield Band(len(x.query), x.group, 1, rows, position, oldest + tall - 1, x.window - tall + 1, None)
    mask = _mask(size, tall - 1).repeat(x.group, 1)
    runs = slice(oldest, oldest + tall - 1), slice(position + 1, position + tall)
    yield Band(len(x.query), x.group, tall // size, rows, position, 0, mask.shape[1], mask, runs)


def _mask(queries: int, window: int) -> Tensor:
    """0 where query `r` of a block sees column `c`, else -inf: r <= c < r + window."""
    mask = torch.zeros(queries, window + queries - 1)
    corner = torch.full((queries, queries), -torch.inf)
    mask[:, :queries] += corner.tril(-1)
    mask[:, window:] += corner[:, 1:].triu(0)
    return mask
