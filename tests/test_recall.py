"""Recall against its dense float64 definition, from each layer's own raw queries, keys and values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpatch import Recall, convert_llama_model
from tests.test_definition import record_attention
from tests.tiny import random_ids, read_in_chunks, tiny_llama

WINDOW, SINKS = 12, 3


def definition(query, key, value, frequencies, first, scale, window, sinks, distance, recall, queries):
    """Λ-attention, float64 [B, n, H * d], where the best of the middle join the softmax of the queries in `queries`.

    Queries and keys [B, H, n, d] are raw, before any rotation. The middle of query i: sinks <= j <= i - window, at most
    `max_tokens` of them. Token mode: each head's k best by their scores at `recall.distance`. Block mode: the k best
    blocks of row tokens [b * size, (b + 1) * size) wholly in the middle, by the sum, over the query heads of one key head, of the
    softmax over blocks of sum_c max(q_c max_c, q_c min_c).
    """
    group = query.shape[1] // key.shape[1]
    batch, heads, count, half = *query.shape[:3], query.shape[3] // 2
    query, key, value = query.double(), key.double(), value.double()
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
    scores = scores_at(torch.where(d < window, d, distance)).masked_fill(~visible[:, None], -torch.inf)
    middle = (d >= window) & (j_in_row >= sinks)[:, None, :]
    if recall.max_tokens is not None:
        middle = middle & (d < window + recall.max_tokens)
    at_distance = scores_at(torch.full_like(d, recall.distance))
    far_query = turned(query, recall.distance * frequencies)
    k, size = recall.top_k, recall.block_tokens
    for b in range(batch):
        for i in queries:
            tokens = middle[b, i].nonzero().flatten()
            for head in range(heads):
                if size == 1:
                    if len(tokens) < k:
                        continue
                    chosen = tokens[at_distance[b, head, i, tokens].argsort(descending=True)[:k]]
                else:
                    start = int(first[b])
                    blocks = [torch.arange(start + n * size, start + (n + 1) * size) for n in range(count // size)]
                    blocks = [block for block in blocks if block[-1] < count and middle[b, i, block].all()]
                    if len(blocks) < k:
                        continue
                    worth = 0
                    for member in range(head // group * group, head // group * group + group):
                        q = far_query[b, member, i]
                        bounds = torch.stack(
                            [
                                torch.maximum(
                                    q * key[b, head // group, block].amax(0), q * key[b, head // group, block].amin(0)
                                ).sum()
                                for block in blocks
                            ]
                        )
                        worth = worth + (scale * bounds).softmax(0)
                    chosen = torch.cat([blocks[n] for n in worth.argsort(descending=True)[:k]])
                scores[b, head, i, chosen] = at_distance[b, head, i, chosen]
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)


SHAPES = st.fixed_dictionaries(
    {
        "count": st.integers(20, 90),
        "window": st.integers(1, 30),
        "sinks": st.sampled_from([0, 1, 4]),
        "heads": st.sampled_from([(2, 2), (4, 2), (4, 1)]),
        "padding": st.lists(st.integers(0, 12), min_size=1, max_size=3),
        "chunks": st.sampled_from([None, (1000,), (7,), (1, 30, 9)]),
        "top_k": st.sampled_from([1, 3, 5]),
        "block": st.sampled_from([1, 1, 2, 4]),
        "distance": st.sampled_from([0, 5, 40]),
        "queries": st.sampled_from([None, None, 1, 3]),
        "max_tokens": st.sampled_from([None, 20]),
        "from_layer": st.sampled_from([0, 1]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=25)
@given(SHAPES)
@torch.no_grad()
def test_every_layer_equals_the_definition(case):
    recall = Recall(
        top_k=case["top_k"],
        block_tokens=case["block"],
        distance=case["distance"],
        queries=case["queries"],
        max_tokens=case["max_tokens"],
        from_layer=case["from_layer"],
    )
    heads, key_heads = case["heads"]
    model = tiny_llama(case["seed"], num_attention_heads=heads, num_key_value_heads=key_heads).double()
    frequencies = model.model.rotary_emb.inv_freq.double()
    ids, first = random_ids(len(case["padding"]), case["count"], case["seed"]), torch.tensor(case["padding"])
    first[0] = min(first[0], case["padding"][0])
    mask = (torch.arange(case["count"]) >= first[:, None]).long()
    convert_llama_model(model, case["window"], case["sinks"], recall=recall)
    seen = record_attention(model)
    if case["chunks"] is None:
        model(ids, attention_mask=mask, use_cache=False)
        sizes = (case["count"],)
    else:
        sizes = case["chunks"]
        read_in_chunks(model, ids, sizes, mask)
    queries, start, turn = [], 0, 0
    while start < case["count"]:
        stop = min(start + sizes[turn % len(sizes)], case["count"])
        queries += range(start if recall.queries is None else max(start, stop - recall.queries), stop)
        start, turn = stop, turn + 1
    for number, record in enumerate(seen):
        raw = [torch.cat(record[name], dim=1) for name in ("q_proj", "k_proj", "v_proj")]
        head_dim = raw[0].shape[-1] // heads
        raw = [tensor.unflatten(2, (-1, head_dim)).transpose(1, 2) for tensor in raw]
        arguments = case["window"], case["sinks"], case["window"]
        expected = definition(
            *raw, frequencies, first, head_dim**-0.5, *arguments, recall, queries if recall.covers(number) else []
        )
        actual = torch.cat(record["out"], dim=1)
        valid = mask.bool()
        torch.testing.assert_close(actual[valid], expected[valid], atol=3e-5, rtol=1e-4)
