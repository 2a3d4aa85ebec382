"""Which tokens a query recalls, and its attention to them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from longpatch_kernels.inputs import computing_dtype

from .lookup import Lookup
from .memory import Memory
from .settings import SEGMENT_TOKENS

SCORES = 2**23  # numbers in one piece of scores


def attend(
    memory: Memory,
    query: Tensor,
    lookup: Lookup,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` [B, Hq, q, d], already at the distance of recalled tokens, to those that it recalls.

    `bias` [Hq] is added to every score (ALiBi: -slope x distance). Returns out [B, Hq, q, d] and log-sum-exp
    [B, Hq, q]; 0 and -inf for a query that recalls nothing. `recalled(memory)` tells afterwards what was recalled.
    """
    dtype = computing_dtype(query.dtype)
    grouped = (query.to(dtype) * scale).unflatten(1, (memory.key_heads, -1))  # [B, Hkv, g, q, d]
    if bias is not None:
        bias = bias.to(dtype).view(1, memory.key_heads, -1, 1, 1)
    longest = max(1, SCORES // _numbers(grouped, lookup))
    if query.shape[2] <= longest:
        out, lse, chosen = _attend(memory, grouped, lookup, softcap, bias)
    else:
        parts = [
            _attend(memory, part, lookup.part(number * longest, (number + 1) * longest), softcap, bias)
            for number, part in enumerate(grouped.split(longest, dim=3))
        ]
        out, lse, chosen = (torch.cat(of, dim=3) for of in zip(*parts, strict=True))
    memory.found = chosen, lookup
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def recalled(memory: Memory) -> Tensor | None:
    """What the queries of the last forward recalled, [B, Hq, queries, tokens], -1 where nothing; None if none did.

    Tokens count from each row's first one.
    """
    if memory.found is None:
        return None
    chosen, lookup = memory.found
    tokens = chosen if lookup.settings.block_tokens == 1 else _tokens_of(chosen, lookup)
    return torch.where(tokens < 0, -1, tokens + lookup.sinks).flatten(1, 2)


def _numbers(query: Tensor, lookup: Lookup) -> int:
    """How many numbers one query of `query` [B, Hkv, g, q, d] takes while it seeks and fetches."""
    batch, key_heads, group, _, dim = query.shape
    size, fetched = lookup.settings.block_tokens, lookup.settings.top_k * lookup.settings.block_tokens
    if size == 1:
        return batch * key_heads * group * (1024 + fetched * dim)
    return batch * key_heads * (group * (lookup.limits.last // size + 1 + fetched) + 2 * fetched * dim)


def _attend(
    memory: Memory, query: Tensor, lookup: Lookup, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Out [B, Hkv, g, q, d], log-sum-exp [B, Hkv, g, q] and what was chosen, tokens or blocks [B, Hkv, g, q, k]."""
    if lookup.settings.block_tokens == 1:
        scores, tokens = _best_tokens(memory, query, lookup)
        values = memory.fetch("values", tokens.clamp_min(0).flatten(2), 1, query.dtype).to(query.device)
        values, chosen = values.view(*tokens.shape, -1), tokens  # [B, Hkv, g, q, k, d]
    else:
        blocks = _best_blocks(memory, query, lookup)
        scores, tokens, values = _block_tokens(memory, query, blocks, lookup)
        chosen = blocks[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill((tokens < 0).expand_as(scores), -torch.inf)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    if values.shape[2] == 1:  # one choice for all heads of a key head
        out = (weights.transpose(2, 3) @ values[:, :, 0]).transpose(2, 3)
    else:
        out = (weights[..., None, :] @ values).squeeze(-2)
    return out, lse, chosen


def _best_tokens(memory: Memory, query: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Scores and tokens [B, Hkv, g, q, k] of each query head's best; -inf and -1 where fewer than k may be recalled."""
    device, home, k = query.device, memory.home, lookup.settings.top_k
    query, first, last = query.to(home), lookup.first.to(home), lookup.last.to(home)
    rows = query.flatten(2, 3)  # [B, Hkv, g q, d]
    shape = (*query.shape[:4], k)
    best = query.new_full(shape, -torch.inf)
    tokens = torch.full(shape, -1, device=home)
    longest = max(1024, SCORES // rows[..., 0].numel())
    limits = lookup.limits
    for start, stop, segment in memory.pieces(limits.first, limits.last, longest):
        place = start % SEGMENT_TOKENS
        keys = segment.read("keys", (slice(None), slice(None), slice(place, place + stop - start)), rows.dtype)
        scores = _products(rows, keys).view(*query.shape[:4], -1)
        if start < limits.all_first or stop > limits.all_last + 1:
            token = torch.arange(start, stop, device=home)
            hidden = (token < first[..., None]) | (token > last[..., None])
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        score, index = scores.topk(min(k, stop - start), dim=-1)
        best, order = torch.cat((best, score), dim=-1).topk(k, dim=-1)
        tokens = torch.cat((tokens, index + start), dim=-1).gather(-1, order)
    none = best[..., -1:].isneginf()
    return best.masked_fill(none, -torch.inf).to(device), tokens.masked_fill(none, -1).to(device)


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """Of `rows` [..., n, d] and `keys` [..., m, d]: [..., n, m].

    Few rows, as in a decode step, go on the right: a CPU then takes less than half the time.
    """
    return rows @ keys.mT if rows.shape[-2] > 16 else (keys @ rows.mT).mT


@torch.no_grad()
def _best_blocks(memory: Memory, query: Tensor, lookup: Lookup) -> Tensor:
    """Blocks [B, Hkv, q, k] that the query heads of a key head together find best; -1 where there are fewer.

    A head gives each block the softmax, over all blocks with tokens that may be recalled, of the bound on its scores; a
    block's worth is the sum over the heads. A head that knows what it seeks has its way, one that does not hardly
    counts.
    """
    size, k, limits = lookup.settings.block_tokens, lookup.settings.top_k, lookup.limits
    start, representatives = memory.representatives(limits.last // size + 1, limits.row_last // size + 1, query)
    signed = torch.cat((query.clamp_min(0), query.clamp_max(0)), dim=-1)
    scores = _products(signed.flatten(2, 3), representatives).view(*query.shape[:4], -1)
    blocks = scores.shape[-1]
    if start < limits.all_first // size or start + blocks - 1 > limits.all_last // size:
        block = torch.arange(start, start + blocks, device=query.device)
        hidden = (block < lookup.first[..., None] // size) | (block > lookup.last[..., None] // size)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        worth = scores.softmax(dim=-1).sum(dim=2).masked_fill(hidden[:, None], -torch.inf)
    else:
        worth = scores.softmax(dim=-1).sum(dim=2)
    value, chosen = worth.topk(min(k, blocks), dim=-1)
    return pad((chosen + start).masked_fill(value.isneginf(), -1), (0, k - value.shape[-1]), value=-1)


def _block_tokens(memory: Memory, query: Tensor, blocks: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor]:
    """Of the blocks' tokens that may be recalled, t = k block_tokens with the others as -inf and -1.

    Scores [B, Hkv, g, q, t], tokens [B, Hkv, 1, q, t] and values [B, Hkv, 1, q, t, d].
    """
    size = lookup.settings.block_tokens
    starts = blocks.clamp_min(0).flatten(2) * size
    keys, values = (
        memory.fetch(name, starts, size, query.dtype).to(query.device).view(*blocks.shape[:3], -1, query.shape[-1])
        for name in ("keys", "values")
    )
    tokens = _tokens_of(blocks[:, :, None], lookup)
    scores = _products(query.transpose(2, 3), keys).transpose(2, 3)
    return scores.masked_fill(tokens < 0, -torch.inf), tokens, values[:, :, None]


def _tokens_of(blocks: Tensor, lookup: Lookup) -> Tensor:
    """Tokens of blocks [B, Hkv, g, q, k] that may be recalled, [B, Hkv, g, q, k block_tokens], the others -1."""
    size = lookup.settings.block_tokens
    tokens = blocks[..., None] * size + torch.arange(size, device=blocks.device)
    first, last = (limit[:, None, None, :, None, None] for limit in (lookup.first, lookup.last))
    hidden = (blocks[..., None] < 0) | (tokens < first) | (tokens > last)
    return tokens.masked_fill(hidden, -1).flatten(4)
