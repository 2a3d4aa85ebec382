"""Tiny models that recall; and which keys a query recalls, by definition, dense and in float64, for every family."""

import pytest
import torch

from longpatch import Recall, convert_llama_model
from tests.tiny import tiny_llama

WINDOW, SINKS = 12, 3
NEAR = {"atol": 2e-5, "rtol": 2e-5}  # of float64: phases are float32 on purpose
MODES = {"tokens": Recall(top_k=4, queries=None), "blocks": Recall(top_k=3, block_tokens=4, queries=None)}
both_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def converted(recall, seed=0, **model):
    return convert_llama_model(tiny_llama(seed, **model), WINDOW, SINKS, slack=8, recall=recall)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


def best_tokens(scores, middle, top_k):
    """[B, H, n, n]: of the keys in `middle` [B, 1, n, n] the `top_k` of the best `scores`, where there are so many."""
    seen = scores.masked_fill(~middle, -torch.inf)
    enough = middle.sum(dim=-1, keepdim=True) >= top_k
    return middle & enough & (seen >= seen.topk(top_k).values[..., -1:])


def best_blocks(query, key, middle, number, top_k, group):
    """The same for the keys in `middle` of the best blocks; `number` [B, n] tells each key's block.

    `query` [B, H, n, d] is scaled and turned to the distance of recall, `key` is raw. The query heads of a group choose
    together, by the sum of their softmax over blocks of sum_c max(q_c max_c, q_c min_c).
    """
    chosen = torch.zeros_like(middle).repeat(1, query.shape[1], 1, 1)
    for row in range(len(query)):
        of_block = torch.stack([number[row] == block for block in range(int(number[row].max()) + 1)])  # [blocks, n]
        keys = [key[row, :, tokens] for tokens in of_block]
        largest, smallest = (torch.stack([f(k, dim=1) for k in keys], dim=1) for f in (torch.amax, torch.amin))
        q = query[row, :, :, None]  # [H, n, 1, d]
        bounds = torch.maximum(q * largest[:, None], q * smallest[:, None]).sum(dim=-1)  # [H, n, blocks]
        candidate = (middle[row, 0, :, None] & of_block).any(dim=-1)  # [n, blocks]
        share = bounds.masked_fill(~candidate, -torch.inf).softmax(dim=-1).nan_to_num()
        worth = share.unflatten(0, (-1, group)).sum(dim=1).masked_fill(~candidate, -1)
        best = worth.topk(min(top_k, len(keys))).indices
        picked = torch.zeros_like(worth).scatter(-1, best, 1) * candidate
        chosen[row] = (picked @ of_block.to(picked.dtype) > 0).repeat_interleave(group, 0) & middle[row]
    return chosen


def definition(raw, frequencies, first, scale, window, sinks, recall, queries):
    """Λ-attention, float64 [B, n, H * d], where the best of the middle join the softmax of the queries in `queries`.

    And the tokens that they recall, by (row, head, query), counted from the row's first one.

    Queries and keys [B, H, n, d] are raw, before any rotation. The middle of query i: sinks <= j <= i - window, at most
    `max_tokens` of them. Token mode: each head's k best by their scores at `recall.distance`. Block mode: the k best
    blocks of row tokens [sinks + n size, sinks + (n + 1) size) with tokens in the middle, by the sum, over the query
    heads of one key head, of the softmax over blocks of sum_c max(q_c max_c, q_c min_c); their tokens in the middle.
    """
    query, key, value = (tensor.double() for tensor in raw)
    group = query.shape[1] // key.shape[1]
    batch, heads, count, half = *query.shape[:3], query.shape[3] // 2
    index = torch.arange(count)
    d = index[:, None] - index

    def turned(x, angle):
        x = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()).double(), angle)
        return torch.cat((x.real, x.imag), dim=-1)

    def scores_at(e):  # [n, n] distances
        turn = torch.polar(torch.ones(()).double(), e.double()[..., None] * frequencies)
        q, k = (torch.complex(x[..., :half], x[..., half:]) for x in (query, key.repeat_interleave(group, 1)))
        return scale * torch.einsum("bhif,bhjf,ijf->bhij", q, k.conj(), turn).real

    j_in_row = index - first[:, None]
    visible = (d >= 0) & ((d < window) | (j_in_row < sinks)[:, None, :]) & (j_in_row >= 0)[:, None, :]
    scores = scores_at(d.clamp(max=window)).masked_fill(~visible[:, None], -torch.inf)
    middle = (d >= window) & (j_in_row >= sinks)[:, None, :]
    if recall.max_tokens is not None:
        middle = middle & (d < window + recall.max_tokens)
    at_distance = scores_at(torch.full_like(d, recall.distance))
    far_query = turned(query, recall.distance * frequencies)
    k, size, recalled = recall.top_k, recall.block_tokens, {}
    for b in range(batch):
        for i in queries:
            tokens = middle[b, i].nonzero().flatten()
            for head in range(heads):
                if size == 1:
                    if len(tokens) < k:
                        continue
                    chosen = tokens[at_distance[b, head, i, tokens].argsort(descending=True)[:k]]
                else:
                    start = int(first[b]) + sinks
                    blocks = [torch.arange(start + n * size, start + (n + 1) * size) for n in range(count // size)]
                    blocks = [block for block in blocks if block[-1] < count and middle[b, i, block].any()]
                    if not blocks:
                        continue
                    worth = torch.zeros(len(blocks)).double()
                    of_blocks = [key[b, head // group, block] for block in blocks]
                    for member in range(head // group * group, head // group * group + group):
                        q = far_query[b, member, i]
                        bounds = [torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum() for keys in of_blocks]
                        worth += (scale * torch.stack(bounds)).softmax(0)
                    chosen = torch.cat([blocks[n] for n in worth.argsort(descending=True)[:k]])
                    chosen = chosen[middle[b, i, chosen]]
                scores[b, head, i, chosen] = at_distance[b, head, i, chosen]
                recalled[b, head, i] = set((chosen - first[b]).tolist())
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(2), recalled
