"""A call cut into pieces: one batch row and some of its key heads at a time, with all that belongs to them.

Shapes: S key heads of a piece, g query heads a key head, n queries, m window keys, f far keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..inputs import LambdaInputs, computing_dtype

SCORE_BYTES = 5 * 2**20  # a thread, of scores that exist at one time: still in a CPU's last cache
STRETCH_KEYS = 1280  # keys of one query among them
# Queries of a block: more of them score more keys that not all of them see, fewer mean more calls. Measured: best at a
# window of 256 and of 1,024 keys.
BLOCK_QUERIES = 128


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


def blocks_at_a_time(group: int, queries: int, keys: int, dtype: torch.dtype) -> int:
    """How many blocks of so many queries and keys have no more than SCORE_BYTES of scores."""
    each = dtype.itemsize * group * queries * min(keys, STRETCH_KEYS)
    return SCORE_BYTES * torch.get_num_threads() // max(1, each)


def pieces(x: LambdaInputs, along: Sequence[Tensor] = (), along_keys: Sequence[Tensor] = ()) -> Iterator[Piece]:
    """All of `x`, as many heads at a time as SCORE_BYTES allows.

    With them go tensors [B, Hq, n, ...] and [B, Hkv, m, d] or [B, Hkv, f, d].
    """
    batch, key_heads = x.key.shape[:2]
    group, on_cpu = x.group, x.query.is_cpu
    queries, dtype = min(BLOCK_QUERIES, x.query_count), computing_dtype(x.query.dtype)
    keys = x.key_count if x.wraps else queries + min(x.window, x.key_count)
    heads = max(1, blocks_at_a_time(group, queries, keys, dtype))
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
