"""Triton backward, gradients of key and value: tiles of keys walk the queries that see them, head by head of the group.

Each key's sum has one owner and one order: no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import LambdaInputs
from . import pack, tuning
from .tiles import (
    differentiate,
    load_first_valid,
    load_lse,
    load_pair,
    load_slope,
    queries_of_keys,
    store_tile,
    tile_count,
    tile_start,
    window_rules,
)


@triton.jit
def accumulate_window(
    key_sum, value_sum, key, value, query, grad_out, lse, delta, rule, slope, batch, head, bounds, index, offset,
    queries, window, valid,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Either the tiles that need the mask or those that do not. Tiles lie [N, M]: neither sum needs a transpose."""
    for tile in tl.range(0, tile_count(bounds, BLOCK_M, MASKED)):
        start = tile_start(tile, bounds, BLOCK_M, MASKED)
        query_tile, upstream = load_pair(
            query, grad_out, batch, head, start, queries, BLOCK_M, DIM, BLOCK_D, MASKED, TMA
        )
        row = start + tl.arange(0, BLOCK_M)
        row_lse = load_lse(lse, row, queries)[None, :]
        row_delta = tl.load(delta + row, mask=row < queries, other=0.0)[None, :]
        visible, distance = window_rules((offset + row)[None, :], index, window, valid)
        scores = tl.dot(key, tl.trans(query_tile), input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
        weights, grad_scores = differentiate(
            scores, grad_weights, row_lse, row_delta, visible, distance, slope, rule, MASKED
        )
        value_sum = tl.dot(weights.to(upstream.dtype), upstream, value_sum, input_precision=PRECISION)
        key_sum = tl.dot(grad_scores.to(query_tile.dtype), query_tile, key_sum, input_precision=PRECISION)
    return key_sum, value_sum


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def key_kernel(
    query, key, value, rule, grad_out, lse, delta, grad_key, grad_value, first_valid, queries, keys, window, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    key_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_index = tile * BLOCK_N
    offset = keys - queries
    index = (start_index + tl.arange(0, BLOCK_N))[:, None]
    valid = load_first_valid(first_valid, batch)
    block, value_block = load_pair(key, value, batch, key_head, start_index, keys, BLOCK_N, DIM, BLOCK_D, True)
    bounds = queries_of_keys(start_index, window, valid, offset, queries, BLOCK_M, BLOCK_N)
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        slope = load_slope(rule, head)
        per_row = (batch.to(tl.int64) * tl.num_programs(0) * group + head) * queries
        key_sum, value_sum = accumulate_window(
            key_sum, value_sum, block, value_block, query, grad_out, lse + per_row, delta + per_row, rule, slope,
            batch, head, bounds, index, offset, queries, window, valid, DIM, BLOCK_D, BLOCK_M, True, PRECISION, TMA,
        )  # fmt: skip
        key_sum, value_sum = accumulate_window(
            key_sum, value_sum, block, value_block, query, grad_out, lse + per_row, delta + per_row, rule, slope,
            batch, head, bounds, index, offset, queries, window, valid, DIM, BLOCK_D, BLOCK_M, False, PRECISION, TMA,
        )  # fmt: skip
    store_tile(grad_key, batch, key_head, start_index, keys, key_sum * rule.scale, BLOCK_N, DIM, BLOCK_D)
    store_tile(grad_value, batch, key_head, start_index, keys, value_sum, BLOCK_N, DIM, BLOCK_D)


def key_grads(x: LambdaInputs, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of key and value [B, Hkv, m, d]."""
    batch, key_heads, keys, dim = x.key.shape
    grad_key = torch.empty_like(x.key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(x.value, memory_format=torch.contiguous_format)
    config = tuning.choose("key", x)
    (query, upstream), tma = pack.tiles((x.query, grad_out), config.block_m, config.tma)
    key_kernel[(key_heads, triton.cdiv(keys, config.block_n), batch)](
        query, pack.rows(x.key), pack.rows(x.value), pack.rule(x), upstream, lse, delta,
        pack.rows(grad_key), pack.rows(grad_value), x.first_valid, x.query_count, keys, x.window, x.group,
        DIM=dim, TMA=tma, **config.constants(dim, 0), **tuning.launch_options(x, config),
    )  # fmt: skip
    return grad_key, grad_value
