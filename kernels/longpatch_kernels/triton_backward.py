"""Triton backward: one kernel per gradient owner, scores recomputed, no atomics: the same bits in every run.

`query_kernel` walks keys like the forward; `key_kernel` walks the queries of a group for each key tile; `far_kernel` does
so for the far keys in chunks of queries, whose float32 partial sums are added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pack, tuning
from .inputs import LambdaInputs
from .tiles import (
    differentiate,
    far_visible,
    keys_of_queries,
    load_far_mask,
    load_lse,
    load_tile,
    queries_of_keys,
    start_of,
    store_tile,
    window_visible,
)


@triton.jit(do_not_specialize=["queries"])
def delta_kernel(
    out, grad_out, grad_lse, delta, queries,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, n] = <out, grad_out> - grad_lse: what softmax subtracts from the gradient of each weight."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tile * BLOCK_M
    left = load_tile(start_of(out, batch, head), out.row, start, queries, BLOCK_M, DIM, BLOCK_D, True)
    right = load_tile(start_of(grad_out, batch, head), grad_out.row, start, queries, BLOCK_M, DIM, BLOCK_D, True)
    row = start + tl.arange(0, BLOCK_M)
    place = (batch.to(tl.int64) * tl.num_programs(1) + head) * queries + row
    sums = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + place, mask=row < queries, other=0.0)
    tl.store(delta + place, sums, mask=row < queries)


@triton.jit
def query_grad_window(
    grad, query, grad_out, lse, delta, key_start, key_stride, value_start, value_stride, rule, slope,
    first, stop, position, keys, window, first_valid,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, stop, BLOCK_N):
        key = load_tile(key_start, key_stride, start, keys, BLOCK_N, DIM, BLOCK_D, MASKED)
        value = load_tile(value_start, value_stride, start, keys, BLOCK_N, DIM, BLOCK_D, MASKED)
        index = start + tl.arange(0, BLOCK_N)[None, :]
        visible = None
        if MASKED:
            visible = window_visible(position[:, None], index, window, first_valid)
        distance = None
        if rule.slopes is not None:
            distance = (position[:, None] - index).to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, N]
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        _, grad_scores = differentiate(
            scores, grad_weights, lse[:, None], delta[:, None], visible, distance, slope, rule, MASKED
        )
        grad = tl.dot(grad_scores.to(key.dtype), key, grad, input_precision=PRECISION)
    return grad


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def query_kernel(
    query, key, value, far, rule, grad_out, lse, delta, grad_query, grad_query_far, first_valid,
    queries, keys, window, group,
    FAR: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of query and query_far, tile by tile of queries."""
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // group
    start_row = tile * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    position = row + (keys - queries)
    valid = 0
    if first_valid is not None:
        valid = tl.load(first_valid + batch).to(tl.int32)
    slope = 0.0
    if rule.slopes is not None:
        slope = tl.load(rule.slopes + head)
    per_row = (batch.to(tl.int64) * tl.num_programs(0) + head) * queries
    row_lse = load_lse(lse + per_row, row, queries)
    row_delta = tl.load(delta + per_row + row, mask=row < queries, other=0.0)
    upstream = load_tile(
        start_of(grad_out, batch, head), grad_out.row, start_row, queries, BLOCK_M, DIM, BLOCK_D, True
    )
    if FAR:
        block = load_tile(
            start_of(far.query, batch, head), far.query.row, start_row, queries, BLOCK_M, DIM, BLOCK_D, True
        )
        grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        far_key, far_value = start_of(far.key, batch, key_head), start_of(far.value, batch, key_head)
        for start in tl.range(0, far.count, BLOCK_F):
            index = start + tl.arange(0, BLOCK_F)
            exists = index < far.count
            key_tile = load_tile(far_key, far.key.row, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
            value_tile = load_tile(far_value, far.value.row, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
            place = tl.load(far.positions + batch * far.positions_batch + index, mask=exists, other=0)
            visible = far_visible(position[:, None], place[None, :], window) & exists[None, :]
            if far.mask is not None:
                visible &= load_far_mask(far.mask, batch, head, row[:, None], index[None, :], queries, far.count)
            distance = None
            if far.distances is not None:
                distance = tl.load(far.distances + batch * far.distances_batch + index, mask=exists, other=0.0)[None, :]
            scores = tl.dot(block, tl.trans(key_tile), input_precision=PRECISION)
            grad_weights = tl.dot(upstream, tl.trans(value_tile), input_precision=PRECISION)
            _, grad_scores = differentiate(
                scores, grad_weights, row_lse[:, None], row_delta[:, None], visible, distance, slope, rule, True
            )
            grad = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad, input_precision=PRECISION)
        store_tile(
            start_of(grad_query_far, batch, head), grad_query_far.row, start_row, queries, grad * rule.scale,
            BLOCK_M, DIM, BLOCK_D,
        )  # fmt: skip
    block = load_tile(start_of(query, batch, head), query.row, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
    key_start, value_start = start_of(key, batch, key_head), start_of(value, batch, key_head)
    first, full_first, full_stop, stop = keys_of_queries(
        start_row + keys - queries, window, valid, keys, BLOCK_M, BLOCK_N
    )
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad = query_grad_window(
        grad, block, upstream, row_lse, row_delta, key_start, key.row, value_start, value.row, rule, slope,
        first, full_first, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    grad = query_grad_window(
        grad, block, upstream, row_lse, row_delta, key_start, key.row, value_start, value.row, rule, slope,
        full_first, full_stop, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    grad = query_grad_window(
        grad, block, upstream, row_lse, row_delta, key_start, key.row, value_start, value.row, rule, slope,
        full_stop, stop, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    store_tile(
        start_of(grad_query, batch, head), grad_query.row, start_row, queries, grad * rule.scale,
        BLOCK_M, DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def key_grad_window(
    grad_key, grad_value, key, value, query_start, query_stride, grad_out_start, grad_out_stride, lse, delta,
    rule, slope, first, stop, index, offset, queries, window, first_valid,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, stop, BLOCK_M):
        query = load_tile(query_start, query_stride, start, queries, BLOCK_M, DIM, BLOCK_D, MASKED)
        grad_out = load_tile(grad_out_start, grad_out_stride, start, queries, BLOCK_M, DIM, BLOCK_D, MASKED)
        row = start + tl.arange(0, BLOCK_M)
        row_lse = load_lse(lse, row, queries)[None, :]
        row_delta = tl.load(delta + row, mask=row < queries, other=0.0)[None, :]
        position = (offset + row)[None, :]
        visible = None
        if MASKED:
            visible = window_visible(position, index[:, None], window, first_valid)
        distance = None
        if rule.slopes is not None:
            distance = (position - index[:, None]).to(tl.float32)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [N, M]
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        weights, grad_scores = differentiate(
            scores, grad_weights, row_lse, row_delta, visible, distance, slope, rule, MASKED
        )
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def key_kernel(
    query, key, value, rule, grad_out, lse, delta, grad_key, grad_value, first_valid, queries, keys, window, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value, tile by tile of keys, summed over the query heads of the group in a fixed order."""
    key_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_index = tile * BLOCK_N
    offset = keys - queries
    index = start_index + tl.arange(0, BLOCK_N)
    valid = 0
    if first_valid is not None:
        valid = tl.load(first_valid + batch).to(tl.int32)
    block = load_tile(start_of(key, batch, key_head), key.row, start_index, keys, BLOCK_N, DIM, BLOCK_D, True)
    value_block = load_tile(start_of(value, batch, key_head), value.row, start_index, keys, BLOCK_N, DIM, BLOCK_D, True)
    first, full_first, full_stop, stop = queries_of_keys(
        start_index, window, valid, offset, queries, BLOCK_M, BLOCK_N
    )
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        slope = 0.0
        if rule.slopes is not None:
            slope = tl.load(rule.slopes + head)
        per_row = (batch.to(tl.int64) * tl.num_programs(0) * group + head) * queries
        query_start, grad_out_start = start_of(query, batch, head), start_of(grad_out, batch, head)
        key_sum, value_sum = key_grad_window(
            key_sum, value_sum, block, value_block, query_start, query.row, grad_out_start, grad_out.row,
            lse + per_row, delta + per_row, rule, slope, first, full_first, index, offset, queries, window, valid,
            DIM, BLOCK_D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
        key_sum, value_sum = key_grad_window(
            key_sum, value_sum, block, value_block, query_start, query.row, grad_out_start, grad_out.row,
            lse + per_row, delta + per_row, rule, slope, full_first, full_stop, index, offset, queries, window, valid,
            DIM, BLOCK_D, BLOCK_M, False, PRECISION,
        )  # fmt: skip
        key_sum, value_sum = key_grad_window(
            key_sum, value_sum, block, value_block, query_start, query.row, grad_out_start, grad_out.row,
            lse + per_row, delta + per_row, rule, slope, full_stop, stop, index, offset, queries, window, valid,
            DIM, BLOCK_D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
    store_tile(
        start_of(grad_key, batch, key_head), grad_key.row, start_index, keys, key_sum * rule.scale,
        BLOCK_N, DIM, BLOCK_D,
    )  # fmt: skip
    store_tile(
        start_of(grad_value, batch, key_head), grad_value.row, start_index, keys, value_sum, BLOCK_N, DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=["queries", "keys", "window", "group", "chunk"])
def far_kernel(
    far, rule, grad_out, lse, delta, grad_key, grad_value, queries, keys, window, group, key_heads, chunk,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial gradients of key_far and value_far from `chunk` queries; the partials' batch axis is (chunk, batch)."""
    part, key_head, batch = tl.program_id(0), tl.program_id(1) % key_heads, tl.program_id(2)
    start_index = tl.program_id(1) // key_heads * BLOCK_F
    index = start_index + tl.arange(0, BLOCK_F)
    exists = index < far.count
    key = load_tile(
        start_of(far.key, batch, key_head), far.key.row, start_index, far.count, BLOCK_F, DIM, BLOCK_D, True
    )
    value = load_tile(
        start_of(far.value, batch, key_head), far.value.row, start_index, far.count, BLOCK_F, DIM, BLOCK_D, True
    )
    place = tl.load(far.positions + batch * far.positions_batch + index, mask=exists, other=0)
    distance = None
    if far.distances is not None:
        distance = tl.load(far.distances + batch * far.distances_batch + index, mask=exists, other=0.0)[:, None]
    key_sum = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        slope = 0.0
        if rule.slopes is not None:
            slope = tl.load(rule.slopes + head)
        per_row = (batch.to(tl.int64) * key_heads * group + head) * queries
        query_start, grad_out_start = start_of(far.query, batch, head), start_of(grad_out, batch, head)
        for start in tl.range(part * chunk, tl.minimum((part + 1) * chunk, queries), BLOCK_M):
            query = load_tile(query_start, far.query.row, start, queries, BLOCK_M, DIM, BLOCK_D, True)
            upstream = load_tile(grad_out_start, grad_out.row, start, queries, BLOCK_M, DIM, BLOCK_D, True)
            row = start + tl.arange(0, BLOCK_M)
            visible = far_visible((keys - queries + row)[None, :], place[:, None], window) & exists[:, None]
            if far.mask is not None:
                visible &= load_far_mask(far.mask, batch, head, row[None, :], index[:, None], queries, far.count)
            row_lse = load_lse(lse + per_row, row, queries)[None, :]
            row_delta = tl.load(delta + per_row + row, mask=row < queries, other=0.0)[None, :]
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [F, M]
            grad_weights = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
            weights, grad_scores = differentiate(
                scores, grad_weights, row_lse, row_delta, visible, distance, slope, rule, True
            )
            value_sum = tl.dot(weights.to(upstream.dtype), upstream, value_sum, input_precision=PRECISION)
            key_sum = tl.dot(grad_scores.to(query.dtype), query, key_sum, input_precision=PRECISION)
    partial = part * tl.num_programs(2) + batch
    store_tile(
        start_of(grad_key, partial, key_head), grad_key.row, start_index, far.count, key_sum * rule.scale,
        BLOCK_F, DIM, BLOCK_D,
    )  # fmt: skip
    store_tile(
        start_of(grad_value, partial, key_head), grad_value.row, start_index, far.count, value_sum,
        BLOCK_F, DIM, BLOCK_D,
    )  # fmt: skip


def backward(
    x: LambdaInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, query_far, key_far, value_far. Expects keys in time order."""
    batch, heads, queries, dim = x.query.shape
    key_heads, keys = x.key.shape[1:3]
    upstream, far, rule = pack.rows(pack.dense_last(grad_out)), pack.far(x.far), pack.rule(x)
    query, key, value = (pack.rows(pack.dense_last(t)) for t in (x.query, x.key, x.value))
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x.query, x.key, x.value)]
    shape = (queries, keys, x.window, x.group)

    delta = torch.empty_like(lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta_kernel[(triton.cdiv(queries, 64), heads, batch)](
        pack.rows(out), upstream, grad_lse, delta, queries, DIM=dim, BLOCK_D=tuning.padded(dim), BLOCK_M=64
    )

    config = tuning.choose("key", x)
    key_kernel[(key_heads, triton.cdiv(keys, config.block_n), batch)](
        query, key, value, rule, upstream, lse, delta, pack.rows(grads[1]), pack.rows(grads[2]), x.first_valid, *shape,
        DIM=dim, **config.constants(dim, far.count), **tuning.options(x, config),
    )  # fmt: skip

    grad_query_far = None if x.far is None else torch.empty_like(x.far.query, memory_format=torch.contiguous_format)
    config = tuning.choose("query", x)
    query_kernel[(heads, triton.cdiv(queries, config.block_m), batch)](
        query, key, value, far, rule, upstream, lse, delta, pack.rows(grads[0]),
        None if grad_query_far is None else pack.rows(grad_query_far), x.first_valid, *shape,
        FAR=x.far is not None, DIM=dim, **config.constants(dim, far.count), **tuning.options(x, config),
    )  # fmt: skip
    if x.far is None or grad_query_far is None:
        return *grads, None, None, None

    config = tuning.choose("far", x)
    constants = config.constants(dim, far.count)
    tiles = key_heads * triton.cdiv(far.count, constants["BLOCK_F"])
    # Enough programs to fill the largest chips, and no more partial sums than that.
    parts = max(1, min(triton.cdiv(queries, config.block_m), 512 // max(1, tiles * batch)))
    chunk = triton.cdiv(triton.cdiv(queries, parts), config.block_m) * config.block_m
    parts = triton.cdiv(queries, chunk)
    partials = torch.empty(2, parts * batch, *x.far.key.shape[1:], dtype=torch.float32, device=x.query.device)
    far_kernel[(parts, tiles, batch)](
        far, rule, upstream, lse, delta, pack.rows(partials[0]), pack.rows(partials[1]), *shape, key_heads, chunk,
        DIM=dim, **constants, **tuning.options(x, config),
    )  # fmt: skip
    far_key, far_value = partials.unflatten(1, (parts, batch)).sum(dim=1).to(x.key.dtype)
    return *grads, grad_query_far, far_key, far_value
