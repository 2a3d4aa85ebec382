"""Λ-attention for a few queries over a cache: reading the keys and values once is nearly all the work.

Shapes: S = batch x key heads in one step, r = g n query rows a key head, m window keys, f far keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import LambdaInputs, computing_dtype

MAX_ROWS = 16  # query rows a key head
STEP_BYTES = 4 * 2**20  # keys converted in one step: still in cache when they are multiplied


def suits(x: LambdaInputs) -> bool:
    """One query over a cache, or so few a key head that blocks would not pay."""
    return x.query_count < x.key_count and (x.query_count == 1 or x.query_count * x.group <= MAX_ROWS)


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n]; neither ring nor batch is copied."""
    dtype = computing_dtype(x.query.dtype)
    out = torch.empty_like(x.query, memory_format=torch.contiguous_format)
    lse = out.new_empty(out.shape[:3], dtype=dtype)
    window_hidden, far_hidden = _window_hidden(x), _far_hidden(x)
    for rows, heads in _steps(x, dtype):
        parts = [_scores(x, x.query, x.key, window_hidden, rows, heads)]
        if x.far is not None:
            parts.append(_scores(x, x.far.query, x.far.key, far_hidden, rows, heads))
        scores = torch.cat(parts, dim=-1)
        largest = scores.amax(dim=-1, keepdim=True)
        largest.masked_fill_(largest.isneginf(), 0.0)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        result = weights[..., : x.key_count] @ x.value[rows, heads].to(dtype)
        if x.far is not None:
            result += weights[..., x.key_count :] @ x.far.value[rows, heads].to(dtype)
        result /= total.clamp_min(torch.finfo(dtype).tiny)
        _grouped(x, out)[rows, heads] = result.unflatten(2, (x.group, -1)).to(out.dtype)
        _grouped(x, lse)[rows, heads] = largest.add_(total.log_()).squeeze(-1).unflatten(2, (x.group, -1))
    return out, lse


def _steps(x: LambdaInputs, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key heads taken at once: everything, unless that would copy more than STEP_BYTES at a time."""
    batch, key_heads, keys, dim = x.key.shape
    rows, heads = batch, key_heads
    if x.key.dtype != dtype:
        heads = max(1, STEP_BYTES // (keys * dim * dtype.itemsize))
        rows = max(1, heads // key_heads)
    elif not all(t.stride(0) == key_heads * t.stride(1) for t in (x.key, x.value)):
        rows = 1  # a product over both would copy them
    for row in range(0, batch, rows):
        for head in range(0, key_heads, heads):
            yield slice(row, row + rows), slice(head, head + heads)


def _grouped(x: LambdaInputs, tensor: Tensor) -> Tensor:
    """`[B, Hq, ...]` as `[B, Hkv, g, ...]`."""
    return tensor.unflatten(1, (-1, x.group))


def _scores(x: LambdaInputs, query: Tensor, key: Tensor, hidden: Tensor | None, rows: slice, heads: slice) -> Tensor:
    """Scaled scores [B, Hkv, r, keys] of one step, -inf where hidden."""
    query = _grouped(x, query)[rows, heads].flatten(2, 3)
    dtype = computing_dtype(query.dtype)
    # key @ query and not its transpose: measured 1.5x faster
    scores = (key[rows, heads].to(dtype) @ (query.to(dtype) * x.scale).mT).mT
    if hidden is not None:
        hidden = hidden if len(hidden) == 1 else hidden[rows]
        hidden = hidden if hidden.shape[1] == 1 else hidden[:, heads]
        scores = scores.unflatten(2, (x.group, -1)).masked_fill(hidden, -torch.inf).flatten(2, 3)
    return scores


def _window_hidden(x: LambdaInputs) -> Tensor | None:
    """True where a window key is not to be seen, [1 or B, 1, 1, n, m]; None if all are."""
    n, m = x.query_count, x.key_count
    padding = None if x.first_valid is None or not (x.first_valid > 0).any() else x.first_valid
    if n == 1 and m <= x.window and padding is None:
        return None
    index = x.time_index(torch.arange(m))
    distance = torch.arange(m - n, m)[:, None] - index
    hidden = ((distance < 0) | (distance >= x.window))[None, None, None]
    return hidden if padding is None else hidden | (index < padding[:, None, None, None, None])


def _far_hidden(x: LambdaInputs) -> Tensor | None:
    """The same for far keys, [1 or B, 1 or Hkv, 1 or g, n, f]."""
    if x.far is None:
        return None
    oldest, far = x.key_count - x.query_count, x.far
    if far.mask is None and oldest - int(far.positions.max()) >= x.window:
        return None
    position = torch.arange(oldest, x.key_count)[:, None]
    hidden = (position - far.positions[:, None, :] < x.window)[:, None, None]
    return hidden if far.mask is None else hidden | ~_grouped(x, far.mask)
