"""Triton prefill: one online softmax over the far tiles, the tiles at the window's edges, then the full ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import LambdaInputs
from . import pack, tuning
from .tiles import (
    LN2,
    attend,
    far_rules,
    keys_of_queries,
    load_first_valid,
    load_pair,
    load_slope,
    load_tile,
    store_tile,
    tile_count,
    tile_start,
    window_rules,
)


@triton.jit
def attend_window(
    maximum, total, accumulated, query, key, value, rule, slope, batch, key_head, bounds, position, keys, window, valid,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Either the tiles that need the mask or those that do not."""
    for tile in tl.range(0, tile_count(bounds, BLOCK_N, MASKED)):
        start = tile_start(tile, bounds, BLOCK_N, MASKED)
        tiles = load_pair(key, value, batch, key_head, start, keys, BLOCK_N, DIM, BLOCK_D, MASKED, TMA)
        visible, distance = window_rules(position, start + tl.arange(0, BLOCK_N)[None, :], window, valid)
        maximum, total, accumulated = attend(
            maximum, total, accumulated, query, tiles[0], tiles[1], visible, distance, slope, rule, MASKED, PRECISION
        )
    return maximum, total, accumulated


@triton.jit(do_not_specialize=["queries", "keys", "window", "group"])
def forward_kernel(
    query, key, value, far, rule, out, lse, first_valid, queries, keys, window, group,
    FAR: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: those of one group, and neighbouring query tiles, find their keys in the L2 cache.
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // group
    start_row = tile * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    position = (row + (keys - queries))[:, None]
    valid, slope = load_first_valid(first_valid, batch), load_slope(rule, head)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FAR:
        block = load_tile(far.query, batch, head, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
        for start in tl.range(0, far.count, BLOCK_F):
            tiles = load_pair(far.key, far.value, batch, key_head, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
            index = (start + tl.arange(0, BLOCK_F))[None, :]
            visible, distance = far_rules(far, batch, head, row[:, None], position, index, queries, window)
            maximum, total, accumulated = attend(
                maximum, total, accumulated, block, tiles[0], tiles[1], visible, distance, slope, rule, True,
                PRECISION,
            )  # fmt: skip
    block = load_tile(query, batch, head, start_row, queries, BLOCK_M, DIM, BLOCK_D, True)
    bounds = keys_of_queries(start_row + keys - queries, window, valid, keys, BLOCK_M, BLOCK_N)
    maximum, total, accumulated = attend_window(
        maximum, total, accumulated, block, key, value, rule, slope, batch, key_head, bounds, position, keys, window,
        valid, DIM, BLOCK_D, BLOCK_N, True, PRECISION, TMA,
    )  # fmt: skip
    maximum, total, accumulated = attend_window(
        maximum, total, accumulated, block, key, value, rule, slope, batch, key_head, bounds, position, keys, window,
        valid, DIM, BLOCK_D, BLOCK_N, False, PRECISION, TMA,
    )  # fmt: skip

    blind = total == 0.0  # queries that see no key
    total = tl.where(blind, 1.0, total)
    store_tile(out, batch, head, start_row, queries, accumulated / total[:, None], BLOCK_M, DIM, BLOCK_D)
    place = (batch.to(tl.int64) * tl.num_programs(0) + head) * queries + row
    log = tl.where(blind, float("-inf"), (maximum + tl.log2(total)) * LN2)
    tl.store(lse + place, log, mask=row < queries)


def forward(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, n, d] and lse [B, Hq, n] (float32). Expects keys in time order."""
    batch, heads, queries, dim = x.query.shape
    out = torch.empty_like(x.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=x.query.device)
    config = tuning.choose("forward", x)
    far = pack.far(x.far)
    (key, value), tma = pack.tiles((x.key, x.value), config.block_n, config.tma)
    forward_kernel[(heads, triton.cdiv(queries, config.block_m), batch)](
        pack.rows(x.query), key, value, far, pack.rule(x), pack.rows(out), lse, x.first_valid,
        queries, x.key_count, x.window, x.group,
        FAR=x.far is not None, DIM=dim, TMA=tma, **config.constants(dim, far.count), **tuning.launch_options(x, config),
    )  # fmt: skip
    return out, lse
