"""Triton prefill: one online softmax over the far tiles, then the window's left edge, full tiles and diagonal."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pack, tuning
from .inputs import LambdaInputs
from .tiles import (
    LN2,
    attend,
    far_visible,
    keys_of_queries,
    load_far_mask,
    load_tile,
    start_of,
    store_tile,
    window_visible,
)


@triton.jit
def attend_far(
    maximum, total, accumulated, far, rule, slope, batch, head, key_head, row, position, queries, window,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The far keys' share of queries `row` [M]: one tile for a handful of sinks."""
    query = load_tile(
        start_of(far.query, batch, head), far.query.row, tl.min(row, 0), queries, BLOCK_M, DIM, BLOCK_D, True
    )
    key_start, value_start = start_of(far.key, batch, key_head), start_of(far.value, batch, key_head)
    for start in tl.range(0, far.count, BLOCK_F):
        index = start + tl.arange(0, BLOCK_F)
        exists = index < far.count
        key = load_tile(key_start, far.key.row, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
        value = load_tile(value_start, far.value.row, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
        place = tl.load(far.positions + batch * far.positions_batch + index, mask=exists, other=0)
        visible = far_visible(position[:, None], place[None, :], window) & exists[None, :]
        if far.mask is not None:
            visible &= load_far_mask(far.mask, batch, head, row[:, None], index[None, :], queries, far.count)
        distance = None
        if far.distances is not None:
            distance = tl.load(far.distances + batch * far.distances_batch + index, mask=exists, other=0.0)[None, :]
        maximum, total, accumulated = attend(
            maximum, total, accumulated, query, key, value, visible, distance, slope, rule, True, PRECISION
        )
    return maximum, total, accumulated


@triton.jit
def attend_window(
    maximum, total, accumulated, query, key_start, key_stride, value_start, value_stride, rule, slope,
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
        maximum, total, accumulated = attend(
            maximum, total, accumulated, query, key, value, visible, distance, slope, rule, MASKED, PRECISION
        )
    return maximum, total, accumulated


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def forward_kernel(
    query, key, value, far, rule, out, lse, first_valid, queries, keys, window, group,
    FAR: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: those of one group, and neighbouring query tiles, find their keys in the L2 cache.
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // group
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = row + (keys - queries)
    valid = 0
    if first_valid is not None:
        valid = tl.load(first_valid + batch).to(tl.int32)
    slope = 0.0
    if rule.slopes is not None:
        slope = tl.load(rule.slopes + head)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FAR:
        maximum, total, accumulated = attend_far(
            maximum, total, accumulated, far, rule, slope, batch, head, key_head, row, position, queries, window,
            DIM, BLOCK_D, BLOCK_M, BLOCK_F, PRECISION,
        )  # fmt: skip
    block = load_tile(
        start_of(query, batch, head), query.row, tile * BLOCK_M, queries, BLOCK_M, DIM, BLOCK_D, True
    )
    key_start, value_start = start_of(key, batch, key_head), start_of(value, batch, key_head)
    first, full_first, full_stop, stop = keys_of_queries(
        tile * BLOCK_M + keys - queries, window, valid, keys, BLOCK_M, BLOCK_N
    )
    maximum, total, accumulated = attend_window(
        maximum, total, accumulated, block, key_start, key.row, value_start, value.row, rule, slope,
        first, full_first, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    maximum, total, accumulated = attend_window(
        maximum, total, accumulated, block, key_start, key.row, value_start, value.row, rule, slope,
        full_first, full_stop, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    maximum, total, accumulated = attend_window(
        maximum, total, accumulated, block, key_start, key.row, value_start, value.row, rule, slope,
        full_stop, stop, position, keys, window, valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    blind = total == 0.0  # queries that see no key
    total = tl.where(blind, 1.0, total)
    store_tile(
        start_of(out, batch, head), out.row, tile * BLOCK_M, queries, accumulated / total[:, None],
        BLOCK_M, DIM, BLOCK_D,
    )  # fmt: skip
    log = tl.where(blind, float("-inf"), (maximum + tl.log2(total)) * LN2)
    place = (batch.to(tl.int64) * tl.num_programs(0) + head) * queries + row
    tl.store(lse + place, log, mask=row < queries)


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, n, d] and lse [B, Hq, n] (float32). Expects keys in time order."""
    batch, heads, queries, dim = x.query.shape
    out = torch.empty_like(x.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=x.query.device)
    config = tuning.choose("forward", x)
    far = pack.far(x.far)
    forward_kernel[(heads, triton.cdiv(queries, config.block_m), batch)](
        *(pack.rows(pack.dense_last(t)) for t in (x.query, x.key, x.value)),
        far, pack.rule(x), pack.rows(out), lse, x.first_valid, queries, x.key_count, x.window, x.group,
        FAR=x.far is not None, DIM=dim, **config.constants(dim, far.count), **tuning.options(x, config),
    )  # fmt: skip
    return out, lse
