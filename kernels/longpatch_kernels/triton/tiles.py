"""The Λ mask, its tile bounds and the scores of one tile, defined once for every Triton kernel.

Shape letters: M queries or N keys of one tile, F far keys of one tile, D head size padded to a power of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def window_visible(position, index, window, first_valid):
    """Causal, nearer than `window`, and not left padding. position and index broadcast against each other."""
    return (index <= position) & (position - index < window) & (index >= first_valid)


@triton.jit
def far_visible(position, far_position, window):
    """A far key is seen once it has left the query's window."""
    return position - far_position >= window


@triton.jit
def tile_bounds(first, full_first, full_stop, stop, BLOCK: tl.constexpr):
    """Where the tiles of `[first, stop)` begin, where those wholly inside `[full_first, full_stop)` begin and end."""
    stop = tl.maximum(stop, first)
    full_first = tl.minimum(first + tl.cdiv(tl.maximum(full_first - first, 0), BLOCK) * BLOCK, stop)
    full_stop = tl.maximum(first + tl.maximum(full_stop - first, 0) // BLOCK * BLOCK, full_first)
    return first, full_first, full_stop, stop


@triton.jit
def tile_count(bounds, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Tiles that need the mask, at either edge of the window, or those that do not."""
    first, full_first, full_stop, stop = bounds
    if MASKED:
        return tl.cdiv(full_first - first, BLOCK) + tl.cdiv(stop - full_stop, BLOCK)
    else:
        return tl.cdiv(full_stop - full_first, BLOCK)


@triton.jit
def tile_start(tile, bounds, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    first, full_first, full_stop, _ = bounds
    if MASKED:
        # One loop over both edges: a loop body for each would double the code and the registers held across it.
        left = tl.cdiv(full_first - first, BLOCK)
        return tl.where(tile < left, first, full_stop - left * BLOCK) + tile * BLOCK
    else:
        return full_first + tile * BLOCK


@triton.jit
def keys_of_queries(position, window, first_valid, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bounds of the key tiles that queries at `[position, position + BLOCK_M)` see."""
    oldest = tl.maximum(first_valid, 0)
    first = tl.maximum(position - window + 1, oldest)
    full_first = tl.maximum(position + BLOCK_M - window, oldest)
    return tile_bounds(first, full_first, position + 1, tl.minimum(position + BLOCK_M, keys), BLOCK_N)


@triton.jit
def queries_of_keys(index, window, first_valid, offset, queries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bounds of the query tiles that see keys `[index, index + BLOCK_N)`; query `i` stands at `offset + i`."""
    first = tl.maximum(index - offset, 0)
    full_stop = tl.where(index < first_valid, 0, index + window - offset)
    stop = tl.minimum(index + BLOCK_N - 1 + window - offset, queries)
    return tile_bounds(first, index + BLOCK_N - 1 - offset, tl.minimum(full_stop, queries), stop, BLOCK_M)


@triton.jit
def start_of(rows, batch, head):
    """Pointer to the first row of one head, in 64-bit arithmetic."""
    return rows.pointer + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head


@triton.jit
def tile_pointers(pointer, stride, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    # Only the tile's start needs 64 bits: 32-bit offsets inside the tile halve the registers that addresses take.
    inside = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return pointer + tl.cast(start, tl.int64) * stride + inside


@triton.jit
def tile_mask(start, stop, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return (start + tl.arange(0, BLOCK) < stop)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]


@triton.jit
def load_tile(
    rows, batch, head, start, stop, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECKED: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """Rows `start..` of one head [BLOCK, BLOCK_D]; columns from DIM on and, where CHECKED, rows from `stop` on are 0.

    With TMA, `rows` is a descriptor: Hopper's copy engine computes the addresses and fills in the zeros.
    """
    if TMA:
        return rows.load([batch, head, start, 0]).reshape([BLOCK, BLOCK_D])
    else:
        pointers = tile_pointers(start_of(rows, batch, head), rows.row, start, BLOCK, BLOCK_D)
        if CHECKED:
            return tl.load(pointers, mask=tile_mask(start, stop, BLOCK, DIM, BLOCK_D), other=0.0)
        elif DIM != BLOCK_D:
            return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_pair(
    first, second, batch, head, start, stop, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECKED: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """The same rows of two tensors: keys and values, or queries and the gradients of their outputs."""
    left = load_tile(first, batch, head, start, stop, BLOCK, DIM, BLOCK_D, CHECKED, TMA)
    right = load_tile(second, batch, head, start, stop, BLOCK, DIM, BLOCK_D, CHECKED, TMA)
    return left, right


@triton.jit
def store_tile(
    rows, batch, head, start, stop, tile, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    pointers = tile_pointers(start_of(rows, batch, head), rows.row, start, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(rows.pointer.dtype.element_ty), mask=tile_mask(start, stop, BLOCK, DIM, BLOCK_D))


@triton.jit
def load_first_valid(first_valid, batch):
    if first_valid is not None:
        return tl.load(first_valid + batch).to(tl.int32)
    else:
        return 0


@triton.jit
def load_slope(rule, head):
    if rule.slopes is not None:
        return tl.load(rule.slopes + head)
    else:
        return 0.0


@triton.jit
def window_rules(position, index, window, first_valid):
    """Which keys `index` queries at `position` see, and their distances; what is not used is not compiled."""
    return window_visible(position, index, window, first_valid), (position - index).to(tl.float32)


@triton.jit
def far_rules(far, batch, head, row, position, index, queries, window):
    """Which far keys `index` queries `row` at `position` see, and their distances; the two axes broadcast."""
    exists = index < far.count
    place = tl.load(far.positions + batch * far.positions_batch + index, mask=exists, other=0)
    visible = far_visible(position, place, window) & exists
    if far.mask is not None:
        pointers = start_of(far.mask, batch, head) + row.to(tl.int64) * far.mask.row + index
        visible &= tl.load(pointers, mask=(row < queries) & exists, other=0) != 0
    distance = 0.0
    if far.distances is not None:
        distance = tl.load(far.distances + batch * far.distances_batch + index, mask=exists, other=0.0)
    return visible, distance


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0


@triton.jit
def attend(
    maximum, total, accumulated, query, key, value, visible, distance, slope, rule, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the online softmax: maximum and total [M], accumulated [M, D], in units of log2."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, N]
    if rule.softcap is None and rule.slopes is None:
        factor = rule.scale * LOG2E  # applied after the maximum, inside the exponential's multiply-add
    else:
        factor = 1.0
        if rule.softcap is not None:
            scores = rule.softcap * LOG2E * tanh(scores * rule.scale / rule.softcap)
        else:
            scores = scores * (rule.scale * LOG2E)
        if rule.slopes is not None:
            scores -= slope * LOG2E * distance
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    largest = tl.maximum(maximum, tl.max(scores, 1) * factor)
    if MASKED:
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # rows that have seen nothing yet
    else:
        shift = largest
    weights = tl.exp2(scores * factor - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, 1)
    accumulated = accumulated * decay[:, None]
    accumulated = tl.dot(weights.to(value.dtype), value, accumulated, input_precision=PRECISION)
    return largest, total, accumulated


@triton.jit
def differentiate(scores, grad_weights, lse, delta, visible, distance, slope, rule, MASKED: tl.constexpr):
    """Weights P and P * (dP - delta), the gradient of the scores before `scale`; any orientation of the tile."""
    if rule.softcap is not None:
        capped = tanh(scores * rule.scale / rule.softcap)
        scores = rule.softcap * LOG2E * capped
    else:
        scores = scores * (rule.scale * LOG2E)
    if rule.slopes is not None:
        scores -= slope * LOG2E * distance
    weights = tl.exp2(scores - lse)
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    grad = weights * (grad_weights - delta)
    if rule.softcap is not None:
        grad = grad * (1.0 - capped * capped)
    return weights, grad


@triton.jit
def load_lse(pointer, row, queries):
    """Log-sum-exp in units of log2, +inf where a row saw nothing or is none, so that its weights vanish."""
    lse = tl.load(pointer + row, mask=row < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
