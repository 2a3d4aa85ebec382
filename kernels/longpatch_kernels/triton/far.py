"""Triton backward, gradients of key_far and value_far: every query sees the same few keys.

Chunks of queries give float32 partial sums, added up afterwards in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import FarSegment, LambdaInputs
from . import pack, tuning
from .tiles import differentiate, far_rules, load_lse, load_pair, load_slope, store_tile

PROGRAMS = 512  # fills the largest chips; more would only add partial sums


@triton.jit(do_not_specialize=["queries", "keys", "window", "group", "key_heads", "chunk"])
def far_kernel(
    far, rule, grad_out, lse, delta, grad_key, grad_value, queries, keys, window, group, key_heads, chunk,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over `chunk` queries; the batch axis of the partial sums is (chunk, batch)."""
    part, key_head, batch = tl.program_id(0), tl.program_id(1) % key_heads, tl.program_id(2)
    start_index = tl.program_id(1) // key_heads * BLOCK_F
    index = (start_index + tl.arange(0, BLOCK_F))[:, None]
    key, value = load_pair(far.key, far.value, batch, key_head, start_index, far.count, BLOCK_F, DIM, BLOCK_D, True)
    key_sum = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        slope = load_slope(rule, head)
        per_row = (batch.to(tl.int64) * key_heads * group + head) * queries
        for start in tl.range(part * chunk, tl.minimum((part + 1) * chunk, queries), BLOCK_M):
            query, upstream = load_pair(far.query, grad_out, batch, head, start, queries, BLOCK_M, DIM, BLOCK_D, True)
            row = start + tl.arange(0, BLOCK_M)
            row_lse = load_lse(lse + per_row, row, queries)[None, :]
            row_delta = tl.load(delta + per_row + row, mask=row < queries, other=0.0)[None, :]
            position = (keys - queries + row)[None, :]
            visible, distance = far_rules(far, batch, head, row[None, :], position, index, queries, window)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [F, M]
            grad_weights = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
            weights, grad_scores = differentiate(
                scores, grad_weights, row_lse, row_delta, visible, distance, slope, rule, True
            )
            value_sum = tl.dot(weights.to(upstream.dtype), upstream, value_sum, input_precision=PRECISION)
            key_sum = tl.dot(grad_scores.to(query.dtype), query, key_sum, input_precision=PRECISION)
    partial = part * tl.num_programs(2) + batch
    store_tile(grad_key, partial, key_head, start_index, far.count, key_sum * rule.scale, BLOCK_F, DIM, BLOCK_D)
    store_tile(grad_value, partial, key_head, start_index, far.count, value_sum, BLOCK_F, DIM, BLOCK_D)


def far_grads(
    x: LambdaInputs, segment: FarSegment, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of key_far and value_far [B, Hkv, f, d]. Extra memory: PROGRAMS tiles of partial sums, twice."""
    batch, key_heads, count, dim = segment.key.shape
    queries = x.query_count
    config = tuning.choose("far", x)
    constants = config.constants(dim, count)
    tiles = key_heads * triton.cdiv(count, constants["BLOCK_F"])
    wanted = max(1, min(triton.cdiv(queries, config.block_m), PROGRAMS // (tiles * batch)))
    chunk = triton.cdiv(triton.cdiv(queries, wanted), config.block_m) * config.block_m
    parts = triton.cdiv(queries, chunk)
    partials = torch.empty(2, parts * batch, key_heads, count, dim, dtype=torch.float32, device=x.query.device)
    far_kernel[(parts, tiles, batch)](
        pack.far(segment), pack.rule(x), pack.rows(grad_out), lse, delta, pack.rows(partials[0]),
        pack.rows(partials[1]), queries, x.key_count, x.window, x.group, key_heads, chunk,
        DIM=dim, **constants, **tuning.launch_options(x, config),
    )  # fmt: skip
    grad_key, grad_value = (part.unflatten(0, (parts, batch)).sum(dim=0) for part in partials)
    return grad_key.to(segment.key.dtype), grad_value.to(segment.key.dtype)
