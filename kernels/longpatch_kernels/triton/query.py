"""Triton backward, gradients of query and query_far: tiles of queries walk their keys like the forward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import LambdaInputs
from . import pack, tuning
from .tiles import (
    differentiate,
    far_rules,
    keys_of_queries,
    load_first_valid,
    load_lse,
    load_pair,
    load_slope,
    load_tile,
    store_tile,
    tile_count,
    tile_start,
    window_rules,
)


@triton.jit
def accumulate(
    grad, query, grad_out, lse, delta, key, value, visible, distance, slope, rule, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to the gradient of one tile of queries [M, D]."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, N]
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    _, grad_scores = differentiate(scores, grad_weights, lse, delta, visible, distance, slope, rule, MASKED)
    return tl.dot(grad_scores.to(key.dtype), key, grad, input_precision=PRECISION)


@triton.jit
def accumulate_window(
    grad, query, grad_out, lse, delta, key, value, rule, slope, batch, key_head, bounds, position, keys, window, valid,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Either the tiles that need the mask or those that do not."""
    for tile in tl.range(0, tile_count(bounds, BLOCK_N, MASKED)):
        start = tile_start(tile, bounds, BLOCK_N, MASKED)
        tiles = load_pair(key, value, batch, key_head, start, keys, BLOCK_N, DIM, BLOCK_D, MASKED, TMA)
        visible, distance = window_rules(position, start + tl.arange(0, BLOCK_N)[None, :], window, valid)
        grad = accumulate(
            grad, query, grad_out, lse, delta, tiles[0], tiles[1], visible, distance, slope, rule, MASKED, PRECISION
        )
    return grad


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def query_kernel(
    query, key, value, far, rule, grad_out, lse, delta, grad_query, grad_query_far, first_valid,
    queries, keys, window, group,
    FAR: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // group
    start_row = tile * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    position = (row + (keys - queries))[:, None]
    valid, slope = load_first_valid(first_valid, batch), load_slope(rule, head)
    per_row = (batch.to(tl.int64) * tl.num_programs(0) + head) * queries
    row_lse = load_lse(lse + per_row, row, queries)[:, None]
    row_delta = tl.load(delta + per_row + row, mask=row < queries, other=0.0)[:, None]
    upstream = load_tile(grad_out, batch, head, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
    if FAR:
        block = load_tile(far.query, batch, head, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
        grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, far.count, BLOCK_F):
            tiles = load_pair(far.key, far.value, batch, key_head, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
            index = (start + tl.arange(0, BLOCK_F))[None, :]
            visible, distance = far_rules(far, batch, head, row[:, None], position, index, queries, window)
            grad = accumulate(
                grad, block, upstream, row_lse, row_delta, tiles[0], tiles[1], visible, distance, slope, rule, True,
                PRECISION,
            )  # fmt: skip
        store_tile(grad_query_far, batch, head, start_row, queries, grad * rule.scale, BLOCK_M, DIM, BLOCK_D)
    block = load_tile(query, batch, head, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
    bounds = keys_of_queries(start_row + keys - queries, window, valid, keys, BLOCK_M, BLOCK_N)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad = accumulate_window(
        grad, block, upstream, row_lse, row_delta, key, value, rule, slope, batch, key_head, bounds, position, keys,
        window, valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION, TMA,
    )  # fmt: skip
    grad = accumulate_window(
        grad, block, upstream, row_lse, row_delta, key, value, rule, slope, batch, key_head, bounds, position, keys,
        window, valid, DIM, BLOCK_D, BLOCK_N, False, PRECISION, TMA,
    )  # fmt: skip
    store_tile(grad_query, batch, head, start_row, queries, grad * rule.scale, BLOCK_M, DIM, BLOCK_D)


def query_grads(x: LambdaInputs, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of query and, where there is a far segment, query_far: [B, Hq, n, d] each."""
    batch, heads, queries, dim = x.query.shape
    grad = torch.empty_like(x.query, memory_format=torch.contiguous_format)
    grad_far = None if x.far is None else torch.empty_like(grad)
    config = tuning.choose("query", x)
    far = pack.far(x.far)
    (key, value), tma = pack.tiles((x.key, x.value), config.block_n, config.tma)
    query_kernel[(heads, triton.cdiv(queries, config.block_m), batch)](
        pack.rows(x.query), key, value, far, pack.rule(x), pack.rows(grad_out), lse, delta, pack.rows(grad),
        None if grad_far is None else pack.rows(grad_far), x.first_valid, queries, x.key_count, x.window, x.group,
        FAR=x.far is not None, DIM=dim, TMA=tma, **config.constants(dim, far.count), **tuning.launch_options(x, config),
    )  # fmt: skip
    return grad, grad_far
