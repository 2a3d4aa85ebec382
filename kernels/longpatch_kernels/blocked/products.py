"""Λ-attention by matrix products of blocks: every case and device, linear time, and memory for one block of scores.

An online softmax to base 2 over far keys and stretches of the window (Dao, arXiv 2307.08691). Backward computes the
scores anew from the saved log-sum-exp. Half precision is computed in float32.

Shapes: M blocks at a time, g query heads a key head, R queries of a block, W keys of a stretch.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..inputs import Gradients, LambdaInputs, computing_dtype
from . import folded
from .block import Block, blocks
from .pieces import BLOCK_QUERIES, STRETCH_KEYS, Far, pieces

PARTS = ("window", "far")
LOG2E, LN2 = math.log2(math.e), math.log(2)
MOST_KEYS = STRETCH_KEYS + 64  # whose scores are absorbed at once: a few far keys come along with a stretch


class _Buffer:
    """Memory for scores, taken once a call; without it each tensor is new, as autograd wants it."""

    def __init__(self, like: Tensor, reused: bool = True):
        self.memory = like.new_empty(0, dtype=computing_dtype(like.dtype)) if reused else None
        self.places: dict[tuple[int, ...], Tensor] = {}
        self.used = 0

    def product(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` times `left @ right`, beside what was taken since `free`."""
        if self.memory is None:
            return torch.bmm(left, right) * scale
        shape = *left.shape[:2], right.shape[2]
        start, self.used = self.used, self.used + math.prod(shape)
        if self.memory.numel() < self.used:
            self.memory, self.places = self.memory.new_empty(self.used), {}
        place = self.places.get((start, *shape))
        if place is None:
            place = self.places[start, *shape] = self.memory[start : self.used].view(shape)
        return torch.baddbmm(place, left, right, beta=0, alpha=scale, out=place)

    def free(self):
        self.used = 0


class _Part:
    """One block's queries against a stretch of the window or the far segment."""

    def __init__(self, block: Block, query: Tensor, key: Tensor, value: Tensor, keys: slice, far: Far | None):
        self.block, self.query, self.keys, self.far = block, query, keys, far
        self.key, self.value = key, value  # [M, W, d]
        self.slope: Tensor | None = None  # the soft-cap's derivative

    def scores(self, x: LambdaInputs, buffer: _Buffer) -> Tensor:
        """[M, g R, W] to base 2, -inf where a key is not seen."""
        block, slopes = self.block, self.block.piece.slopes
        scores = buffer.product(self.query, self.key.mT, x.scale * LOG2E)
        if x.softcap is not None:
            capped = torch.tanh(scores / (x.softcap * LOG2E))
            scores, self.slope = capped * (x.softcap * LOG2E), 1 - capped.square()
        if slopes is not None:
            distance = block.distance(self.keys) if self.far is None else self.far.distance
            assert distance is not None
            block.apart(scores).sub_(slopes.to(scores.dtype)[..., None, None] * LOG2E * distance)
        if self.far is None:
            block.hide(scores, self.keys)
        else:
            block.hide_far(scores, self.far)
        return scores

    def add(self, target: Tensor, left: Tensor, right: Tensor):
        """`left.mT @ right` to a gradient of these keys or values."""
        if self.far is None:
            self.block.add_to_keys(target, self.keys, left, right)
        else:
            self.block.add_to_shared(target, left, right)


def _parts(block: Block, names: Sequence[str] = PARTS) -> Iterator[_Part]:
    """The far segment, if one of the block's queries sees any of it, and the stretches of the window."""
    piece, far = block.piece, block.piece.far
    if "far" in names and far is not None and block.sees_far():
        yield _Part(block, block.matrix(far.query), block.shared(far.key), block.shared(far.value), slice(None), far)
    if "window" in names:
        query = block.matrix(piece.query)
        for keys in block.stretches():
            yield _Part(block, query, block.keys(piece.key, keys), block.keys(piece.value, keys), keys, None)


class _Softmax:
    """The largest score [M, g R, 1], the sum of weights and the sum of weighted values [M, g R, d] so far."""

    largest: Tensor | None = None
    total: Tensor
    sums: Tensor

    def __init__(self, block: Block):
        if middle := block.piece.along[2:]:
            self.sums, lse = block.matrix(middle[0]).clone(), block.matrix(middle[1])
            self.largest, self.total = lse * LOG2E, torch.ones_like(lse)

    def absorb(self, seen: Sequence[tuple[Tensor, Tensor]]):
        """Scores, which are used up, and the values [M, W, d] they belong to."""
        largest = seen[0][0].amax(dim=-1, keepdim=True)
        for scores, _ in seen[1:]:
            torch.maximum(largest, scores.amax(dim=-1, keepdim=True), out=largest)
        if self.largest is None:
            # queries that have seen nothing yet: -inf minus this is -inf, not NaN
            largest.clamp_min_(torch.finfo(largest.dtype).min)
        else:
            torch.maximum(self.largest, largest, out=largest)
            decay = self.largest.sub_(largest).exp2_()
            self.total.mul_(decay)
            self.sums.mul_(decay)
        for scores, value in seen:
            weights = scores.sub_(largest).exp2_()
            if self.largest is None:
                self.total, self.sums = weights.sum(dim=-1, keepdim=True), torch.bmm(weights, value)
            else:
                self.total.add_(weights.sum(dim=-1, keepdim=True))
                self.sums.baddbmm_(weights, value)
            self.largest = largest

    def finish(self, block: Block):
        """Into the block's rows of out and lse, lse to base 2; 0 and -inf if nothing was seen."""
        out, lse = map(block.target, block.piece.along[:2])
        if self.largest is None:
            out.zero_()
            lse.fill_(-torch.inf)
            return
        torch.add(block.apart(self.largest), block.apart(self.total.log2()), out=lse[..., None])
        total = self.total.clamp_min_(torch.finfo(self.total.dtype).tiny)
        torch.div(block.apart(self.sums), block.apart(total), out=out)


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, n, d], in memory [B, n, Hq, d] as the next projection reads it, and log-sum-exp [B, Hq, n]."""
    out = torch.empty_like(x.query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = out.new_empty(out.shape[:3], dtype=computing_dtype(out.dtype))
    buffer, x = _Buffer(x.query), _in_order(x.dense())
    folds = folded.suits(x)
    for whole in pieces(x, (out, lse)):
        for piece in folded.split(whole, x.scale) if folds else [whole]:
            for block in blocks(piece):
                softmax = _Softmax(block)
                _attend(x, block, softmax, buffer)
                softmax.finish(block)
    return out, lse.mul_(LN2)


def _in_order(x: LambdaInputs) -> LambdaInputs:
    """The ring unrolled, unless one block reads all of it anyway."""
    return x if x.query_count <= BLOCK_QUERIES else x.in_time_order()


def _attend(x: LambdaInputs, block: Block, softmax: _Softmax, buffer: _Buffer):
    """All that a block sees, as much at once as MOST_KEYS allows."""
    seen, keys = [], 0
    for part in _parts(block):
        keys += part.key.shape[1]
        if seen and keys > MOST_KEYS:
            softmax.absorb(seen)
            seen, keys = [], part.key.shape[1]
            buffer.free()
        seen.append((part.scores(x, buffer), part.value))
    if seen:
        softmax.absorb(seen)
        buffer.free()


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
    """Gradients of the inputs, in the log-sum-exp's dtype; None for a part that is not named."""
    ordered = _in_order(x)
    grads = {
        name: [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in tensors if t is not None]
        for name, tensors in (("window", x.tensors[:3]), ("far", x.tensors[3:]))
        if name in names
    }
    shift = lse.masked_fill(lse.isneginf(), 0.0) * LOG2E
    given = {name: found for name, found in grads.items() if found}
    of_queries = [found[0] for found in given.values()]
    of_keys = [tensor for found in given.values() for tensor in found[1:]]
    again = torch.is_grad_enabled()  # second derivatives keep what is computed here
    buffer = _Buffer(lse, reused=not again)
    for piece in pieces(ordered, (grad_out, shift[..., None], correction[..., None], *of_queries), of_keys):
        # neighbours share keys, whose gradients have to be added one by one
        neighbours = not again and piece.key.shape[0] % torch.get_num_threads() > 0
        for block in blocks(piece, neighbours):
            along, along_keys = block.piece.along, block.piece.along_keys
            block_grad, block_shift, block_correction = map(block.matrix, along[:3])
            targets = {
                name: (along[3 + index], *along_keys[2 * index : 2 * index + 2]) for index, name in enumerate(given)
            }
            for part in _parts(block, names):
                of_query, of_key, of_value = targets["window" if part.far is None else "far"]
                weights = part.scores(x, buffer).sub_(block_shift).exp2_()
                part.add(of_value, weights, block_grad)
                grad = buffer.product(block_grad, part.value.mT).sub_(block_correction).mul_(weights)
                if part.slope is not None:
                    grad = grad * part.slope
                part.add(of_key, grad, part.query)
                block.target(of_query).add_(block.apart(torch.bmm(grad, part.key)))
                buffer.free()
    for found in grads.values():
        for grad in found[:2]:
            grad.mul_(x.scale)
    whole = tuple(grad for name in PARTS for grad in grads.get(name) or [None] * 3)
    return whole if ordered is x else x.as_stored(whole)
