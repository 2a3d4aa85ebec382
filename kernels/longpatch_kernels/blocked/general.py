"""Λ-attention for every case and device in plain PyTorch: queries in blocks, each against its own stretch of keys.

Time and memory traffic grow with n * window, extra memory stays at one block of scores. Backward recomputes the scores
from the saved log-sum-exp. Half-precision inputs are computed in float32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..inputs import FarSegment, Gradients, LambdaInputs, computing_dtype

PARTS = ("window", "far")

SCORE_BYTES = 16 * 2**20  # one block of scores stays within a desktop CPU's last-level cache
LARGEST_BLOCK = 256


def block_size(x: LambdaInputs, names: Sequence[str] = PARTS) -> int:
    """Queries per block: as many as keep a block of scores within SCORE_BYTES, from 16 on.

    At most LARGEST_BLOCK against a window, since a larger block scores more keys that few of its queries see.
    """
    batch, heads = x.query.shape[:2]
    keys, largest = min(x.key_count, x.window + LARGEST_BLOCK), LARGEST_BLOCK
    if "window" not in names and x.far is not None:
        keys, largest = x.far.key.shape[2], x.query_count
    return max(16, min(largest, SCORE_BYTES // max(1, 4 * batch * heads * keys)))


class _Block:
    """Scores and masks of queries `rows` against keys `columns`; heads of one group are rows of one matrix product."""

    def __init__(self, x: LambdaInputs, rows: slice, columns: slice):
        self.x, self.rows, self.columns = x, rows, columns
        device = x.query.device
        self.position = torch.arange(rows.start, rows.stop, device=device)[:, None] + x.key_count - x.query_count
        index = torch.arange(columns.start, columns.stop, device=device)
        self.index = x.time_index(index)

    def grouped(self, tensor: Tensor) -> Tensor:
        """Rows of `[B, Hq, n, ...]` as `[B, Hkv, group * rows, ...]` in the computing dtype."""
        part = tensor[:, :, self.rows].to(computing_dtype(tensor.dtype))
        return part.reshape(part.shape[0], -1, self.x.group * part.shape[2], *part.shape[3:])

    def ungrouped(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, self.rows.stop - self.rows.start, *tensor.shape[3:])

    def parts(self, names: Sequence[str] = PARTS) -> Iterator["_Part"]:
        if "window" in names:
            yield self.window()
        if "far" in names and self.x.far is not None:
            yield self.far(self.x.far)

    def window(self) -> "_Part":
        x = self.x
        distance = self.position - self.index  # [rows, columns]
        hidden = (distance < 0) | (distance >= x.window)
        if x.first_valid is not None:
            hidden = hidden | (self.index < x.first_valid[:, None, None, None])
        return _Part(self, "window", x.query, x.key, x.value, self.columns, distance, hidden)

    def far(self, far: FarSegment) -> "_Part":
        hidden = self.position - far.positions[:, None, None, :] < self.x.window
        if far.mask is not None:
            hidden = hidden | ~far.mask[:, :, self.rows]
        distance = None if far.distance is None else far.distance[:, None, None, :]
        return _Part(self, "far", far.query, far.key, far.value, slice(None), distance, hidden)


class _Part:
    """One block's scores against either the window or the far segment."""

    def __init__(self, block, name, query, key, value, columns, distance, hidden):
        self.block, self.name, self.columns = block, name, columns
        dtype = computing_dtype(query.dtype)
        self.query = block.grouped(query)
        self.key = key[:, :, columns].to(dtype)
        self.value = value[:, :, columns].to(dtype)
        x = block.x
        scores = (self.query * x.scale) @ self.key.mT
        if x.softcap is not None:
            scores = x.softcap * torch.tanh(scores / x.softcap)
            self.capped = scores / x.softcap
        per_head = block.ungrouped(scores)
        if x.alibi_slopes is not None:
            per_head = per_head - x.alibi_slopes[:, None, None].to(dtype) * distance
        self.scores = per_head.masked_fill_(hidden, -torch.inf)  # [B, Hq, rows, columns]

    def weights(self, shift: Tensor) -> Tensor:
        """exp(scores - shift) as `[B, Hkv, group * rows, columns]`; uses the scores up."""
        weights = self.scores.sub_(shift[..., None]).exp_()
        return weights.reshape(self.query.shape[:-1] + weights.shape[-1:])

    def backward_scores(self, weights: Tensor, grad_out: Tensor, correction: Tensor) -> Tensor:
        """Gradient of the scaled scores: P * (dO V^T - delta + dlse)."""
        grad = (grad_out @ self.value.mT).sub_(correction[..., None]).mul_(weights)
        if self.block.x.softcap is not None:
            grad = grad * (1 - self.capped.square())
        return grad.mul_(self.block.x.scale)


def _blocks(x: LambdaInputs, names: Sequence[str] = PARTS) -> Iterator[_Block]:
    size, offset = block_size(x, names), x.key_count - x.query_count
    for start in range(0, x.query_count, size):
        stop = min(start + size, x.query_count)
        if x.wraps:
            columns = slice(0, x.key_count)
        else:
            columns = slice(max(0, start + offset - x.window + 1), stop + offset)
        yield _Block(x, slice(start, stop), columns)


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d] and log-sum-exp [B, Hq, n]."""
    x = _ordered(x)
    out = torch.empty_like(x.query)
    lse = torch.empty(x.query.shape[:3], dtype=computing_dtype(x.query.dtype), device=x.query.device)
    for block in _blocks(x):
        parts = list(block.parts())
        largest = torch.stack([part.scores.amax(dim=-1) for part in parts]).amax(dim=0)
        largest = largest.masked_fill_(largest.isneginf(), 0.0)
        total = accumulated = None
        for part in parts:
            weights = part.weights(largest)
            total = weights.sum(dim=-1) if total is None else total + weights.sum(dim=-1)
            weighted = weights @ part.value
            accumulated = weighted if accumulated is None else accumulated + weighted
        assert total is not None
        assert accumulated is not None
        nonzero = total.clamp_min(torch.finfo(total.dtype).tiny)
        out[:, :, block.rows] = block.ungrouped(accumulated / nonzero[..., None]).to(out.dtype)
        lse[:, :, block.rows] = largest + block.ungrouped(total).log()
    return out, lse


def backward(x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of the inputs, the scores computed anew from `lse`."""
    return gradients_of(x, lse, grad_out, correction_of(out, lse, grad_out, grad_lse))


def correction_of(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """What the gradient of a weight is less by, whatever the key: sum of dO * O, less dlse; [B, Hq, n]."""
    total = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
    return total if grad_lse is None else total - grad_lse


def gradients_of(
    x: LambdaInputs, lse: Tensor, grad_out: Tensor, correction: Tensor, names: Sequence[str] = PARTS
) -> Gradients:
    """Gradients of the inputs; None for a part that is not named."""
    ordered = _ordered(x)
    dtype = lse.dtype
    tensors = {"window": x.tensors[:3], "far": x.tensors[3:]}
    grads = {name: [torch.zeros_like(t, dtype=dtype) for t in tensors[name] if t is not None] for name in names}
    shift = lse.masked_fill(lse.isneginf(), 0.0)
    for block in _blocks(ordered, names):
        block_grad, block_correction = block.grouped(grad_out), block.grouped(correction)
        for part in block.parts(names):
            grad_query, grad_key, grad_value = grads[part.name]
            weights = part.weights(shift[:, :, block.rows])
            grad_value[:, :, part.columns] += weights.mT @ block_grad
            grad_scores = part.backward_scores(weights, block_grad, block_correction)
            grad_key[:, :, part.columns] += grad_scores.mT @ part.query
            grad_query[:, :, block.rows] += block.ungrouped(grad_scores @ part.key)
    found = tuple(grad for name in PARTS for grad in grads.get(name) or [None] * 3)
    return found if ordered is x else x.as_stored(found)


def _ordered(x: LambdaInputs) -> LambdaInputs:
    return x if x.query_count <= block_size(x) else x.in_time_order()
