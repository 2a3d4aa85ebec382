"""Triton decode: few queries against a ring of keys, the keys split over programs, partial results merged by lse.

The query heads that share a key head are rows of one tile, so that every key is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import LambdaInputs
from . import pack, tuning
from .tiles import LN2, LOG2E, attend, far_rules, load_first_valid, load_pair, load_slope, start_of, window_rules


@triton.jit
def gather_queries(query, batch, head, row, inside, BLOCK_D: tl.constexpr):
    """Queries `row` of heads `head` [M]: [M, D]; 0 where not `inside`."""
    pointers = start_of(query, batch, head) + row.to(tl.int64) * query.row
    return tl.load(pointers[:, None] + tl.arange(0, BLOCK_D)[None, :], mask=inside, other=0.0)


@triton.jit
def gather_rows(pointer, stride, row, exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `row` [N] of a matrix: [N, D]; 0 where they do not exist."""
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + row.to(tl.int64)[:, None] * stride + column
    return tl.load(pointers, mask=exists[:, None] & (column < DIM), other=0.0)


@triton.jit(do_not_specialize=["queries", "keys", "window", "group", "ring_start", "oldest", "chunk"])
def decode_kernel(
    query, key, value, far, rule, out, lse, first_valid, queries, keys, window, group, ring_start, oldest, chunk,
    FAR: tl.constexpr, LOAD_START: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the keys, `chunk` of them from position `oldest + split * chunk` on; the far keys go to split 0."""
    split, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    packed = tl.arange(0, BLOCK_M)  # row r is query r % queries of the group's head r // queries
    real = packed < group * queries
    head = key_head * group + tl.minimum(packed // queries, group - 1)
    row = packed % queries
    position = (row + (keys - queries))[:, None]
    valid, slope = load_first_valid(first_valid, batch), load_slope(rule, head[:, None])

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = real[:, None] & (column < DIM)
    if FAR:  # noqa: SIM102 (known when compiling, the next is not)
        if split == 0:
            block = gather_queries(far.query, batch, head, row, inside, BLOCK_D)
            for start in tl.range(0, far.count, BLOCK_F):
                tiles = load_pair(far.key, far.value, batch, key_head, start, far.count, BLOCK_F, DIM, BLOCK_D, True)
                index = (start + tl.arange(0, BLOCK_F))[None, :]
                visible, distance = far_rules(far, batch, head[:, None], row[:, None], position, index, queries, window)
                maximum, total, accumulated = attend(
                    maximum, total, accumulated, block, tiles[0], tiles[1], visible, distance, slope, rule, True,
                    PRECISION,
                )  # fmt: skip

    first_slot = ring_start
    if LOAD_START:
        first_slot = tl.load(ring_start).to(tl.int32)
    block = gather_queries(query, batch, head, row, inside, BLOCK_D)
    key_start, value_start = start_of(key, batch, key_head), start_of(value, batch, key_head)
    begin = oldest + split * chunk
    stop = tl.minimum(begin + chunk, keys)
    for start in tl.range(tl.maximum(begin, valid), stop, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        exists = index < stop
        slot = index + first_slot
        slot = tl.where(slot >= keys, slot - keys, slot)
        key_tile = gather_rows(key_start, key.row, slot, exists, DIM, BLOCK_D)
        value_tile = gather_rows(value_start, value.row, slot, exists, DIM, BLOCK_D)
        visible, distance = window_rules(position, index[None, :], window, valid)
        visible &= exists[None, :]
        maximum, total, accumulated = attend(
            maximum, total, accumulated, block, key_tile, value_tile, visible, distance, slope, rule, True, PRECISION
        )

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    # [splits, B, Hq, n]: with one split this is the result itself.
    place = ((split * tl.num_programs(2) + batch).to(tl.int64) * tl.num_programs(1) * group + head) * queries + row
    result = accumulated / total[:, None]
    tl.store(out + place[:, None] * DIM + column, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, tl.where(blind, float("-inf"), (maximum + tl.log2(total)) * LN2), mask=real)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    partial, partial_lse, out, lse, count, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out [count, d] and lse [count] from `splits` partial results [splits, count, d], weighed by their lse."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    exists = split < splits
    column = tl.arange(0, BLOCK_D)[None, :]
    parts = tl.load(partial_lse + split.to(tl.int64) * count + row, mask=exists, other=float("-inf")) * LOG2E
    largest = tl.max(parts, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(parts - shift)
    total = tl.sum(weights, 0)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    pointers = partial + (split.to(tl.int64) * count + row)[:, None] * DIM + column
    results = tl.load(pointers, mask=exists[:, None] & (column < DIM), other=0.0)
    result = tl.sum(results * (weights / total)[:, None], 0)
    columns = tl.arange(0, BLOCK_D)
    tl.store(out + row * DIM + columns, result.to(out.dtype.element_ty), mask=columns < DIM)
    tl.store(lse + row, tl.where(blind, float("-inf"), (shift + tl.log2(total)) * LN2))


def packs(x: LambdaInputs) -> bool:
    """Whether this kernel takes the call: one tile holds every query of a group."""
    return x.query_count * x.group <= tuning.DECODE_ROWS


def decode(x: LambdaInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, n, d] and lse [B, Hq, n] (float32); reads the ring where it lies."""
    batch, heads, queries, dim = x.query.shape
    key_heads, keys = x.key.shape[1:3]
    device = x.query.device
    config = tuning.choose("decode", x)
    oldest = max(0, keys - queries - x.window + 1)
    splits, chunk = tuning.split(batch * key_heads, keys - oldest, config, device)
    out = torch.empty_like(x.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(splits, *out.shape, dtype=torch.float32, device=device)
        partial_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=device)
    far = pack.far(x.far)
    constants = config.constants(dim, far.count)
    constants["BLOCK_M"] = tuning.padded(queries * x.group)
    decode_kernel[(splits, key_heads, batch)](
        *(pack.rows(t) for t in (x.query, x.key, x.value)),
        far, pack.rule(x), partial, partial_lse, x.first_valid, queries, keys, x.window, x.group, x.ring_start,
        oldest, chunk, FAR=x.far is not None, LOAD_START=isinstance(x.ring_start, Tensor), DIM=dim, **constants,
        **tuning.launch_options(x, config),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(lse.numel(),)](
            partial, partial_lse, out, lse, lse.numel(), splits,
            DIM=dim, BLOCK_D=tuning.padded(dim), BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out, lse
