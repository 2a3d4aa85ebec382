"""Recall against its dense float64 definition, from each layer's own raw queries, keys and values."""

import argparse
import copy
import gc
import json
import pickle
import re
from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import DynamicCache

from benchmarks.haystack import NOTHING, Haystack, ask
from longpatch import LambdaCache, LongpatchError, Recall, convert_llama_model, convert_model
from longpatch.cli.flags import add_model_flags, conversion_settings
from longpatch.evaluation.arms import converted_arm, parse_arms
from longpatch.evaluation.cachefile import load_cache, save_cache
from longpatch.evaluation.perplexity import cache_bytes
from longpatch.recall import blocks, memory, search, segment
from tests.families import CASES, SCALED, reference_model, tiny_model
from tests.test_definition import record_attention
from tests.tiny import distinct_ids, random_ids, read_in_chunks, tiny_llama

WINDOW, SINKS = 12, 3


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
    ids, first = distinct_ids(len(case["padding"]), case["count"], case["seed"]), torch.tensor(case["padding"])
    mask = (torch.arange(case["count"]) >= first[:, None]).long()
    window = max(case["window"], case["block"])
    convert_llama_model(model, window, case["sinks"], recall=recall)
    seen = record_attention(model)
    sizes, told = case["chunks"] or (case["count"],), None
    if case["chunks"] is None:
        model(ids, attention_mask=mask, use_cache=False)
    else:
        told = model.longpatch.recalled(read_in_chunks(model, ids, sizes, mask)[1])
    queries, start, turn = [], 0, 0
    while start < case["count"]:
        stop = min(start + sizes[turn % len(sizes)], case["count"])
        queries += range(start if recall.queries is None else max(start, stop - recall.queries), stop)
        start, turn = stop, turn + 1
    for number, record in enumerate(seen):
        raw = [torch.cat(record[name], dim=1) for name in ("q_proj", "k_proj", "v_proj")]
        head_dim = raw[0].shape[-1] // heads
        raw = [tensor.unflatten(2, (-1, head_dim)).transpose(1, 2) for tensor in raw]
        recalling = queries if recall.covers(number) else []
        sizes = window, case["sinks"]
        expected, recalled = definition(raw, frequencies, first, head_dim**-0.5, *sizes, recall, recalling)
        actual = torch.cat(record["out"], dim=1)
        valid = mask.bool()
        torch.testing.assert_close(actual[valid], expected[valid], atol=3e-5, rtol=1e-4)
        if told is not None and number in told:
            of_layer = told[number]
            for b, head, i in product(range(len(ids)), range(heads), range(of_layer.shape[2])):
                query = case["count"] - of_layer.shape[2] + i
                tokens = set(of_layer[b, head, i].tolist()) - {-1}
                assert tokens == recalled.get((b, head, query), set())


def converted(recall, seed=0, **model):
    return convert_llama_model(tiny_llama(seed, **model), WINDOW, SINKS, slack=8, recall=recall)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-4)


NEAR = {"atol": 2e-5, "rtol": 2e-5}  # of float64: phases are float32 on purpose
MODES = {"tokens": Recall(top_k=4, queries=None), "blocks": Recall(top_k=3, block_tokens=4, queries=None)}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float64(mode, dtype):
    """Now and then rounding changes what is recalled, so the median: as near as within the window, or nearly."""
    ids = random_ids(1, 80)
    model = convert_llama_model(tiny_llama(0, dtype), WINDOW, SINKS, recall=mode)
    actual, _ = read_in_chunks(model, ids, (30, 1))
    exact = converted(mode).double()(ids).logits
    error = (actual - exact).abs().mean(dim=-1)[0]
    assert actual.dtype == dtype
    assert error[WINDOW + SINKS + 5 :].median() < 3 * error[:WINDOW].mean()
    assert error.mean() < 0.1 * (converted(None).double()(ids).logits - exact).abs().mean()


@torch.no_grad()
def test_many_queries_take_turns(mode, monkeypatch):
    """What is fetched at once has a bound, and nothing else depends on it."""
    model, ids = converted(mode), distinct_ids(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    expected = model(ids, attention_mask=mask)
    most, fetch, fetched = 30_000, memory.Memory.fetch, []

    def watched(*arguments):
        fetched.append(fetch(*arguments))
        return fetched[-1]

    monkeypatch.setattr(search, "SCORES", most)
    monkeypatch.setattr(memory.Memory, "fetch", watched)
    actual = model(ids, attention_mask=mask)
    close(actual.logits, expected.logits)
    told, at_once = (model.longpatch.recalled(output.past_key_values) for output in (actual, expected))
    assert all(torch.equal(*(of[layer].sort().values for of in (told, at_once))) for layer in (0, 1))
    assert len(fetched) > 20
    assert max(part.numel() for part in fetched) <= most


@pytest.fixture
def short_segments(monkeypatch):
    for module in (memory, blocks, search, segment):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", 16)


def test_recall_matters(mode):
    """What the other tests compare is not what the model computes without recall."""
    ids = random_ids(1, 60)
    with torch.no_grad():
        gap = converted(mode)(ids).logits - converted(None)(ids).logits
    least = mode.top_k if mode.block_tokens == 1 else 1
    recalls = torch.arange(60) >= WINDOW + SINKS + least - 1
    assert gap[0, recalls].abs().amax(-1).gt(1e-3).sum() > 0.9 * recalls.sum()
    close(gap[0, ~recalls], torch.zeros_like(gap[0, ~recalls]))


@torch.no_grad()
def test_storage_and_segments(mode, tmp_path, short_segments):
    """CPU and disk hold what the device holds, in several segments; files are safetensors and go with the cache."""
    ids = random_ids(2, 90)
    expected, _ = read_in_chunks(converted(mode), ids, (30, 1, 7))
    for storage in ("cpu", "disk"):
        folder = str(tmp_path) if storage == "disk" else None
        model = converted(replace(mode, storage=storage, folder=folder))
        actual, cache = read_in_chunks(model, ids, (30, 1, 7))
        assert torch.equal(actual, expected)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 * 6  # two layers, 90 tokens in segments of 16
    with safe_open(files[0], framework="pt") as file:
        held = cache.layers[0].memory.segments[0].tensors["keys"]
        found = [file.get_tensor("keys")] + [safe_open(path, framework="pt").get_tensor("keys") for path in files[1:]]
        assert any(torch.equal(keys, held) for keys in found)
    del cache
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and copies that nobody waits for need a GPU")
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_gpu_recalls_what_the_cpu_does(mode, bits, tmp_path):
    ids = random_ids(2, 90)
    expected, _ = read_in_chunks(converted(replace(mode, bits=bits)), ids, (30, 1, 7))
    for storage in ("device", "cpu", "disk"):
        folder = str(tmp_path) if storage == "disk" else None
        model = converted(replace(mode, bits=bits, storage=storage, folder=folder)).cuda()
        actual, cache = read_in_chunks(model, ids[:, :60].cuda(), (30, 1, 7))
        cache.reorder_cache(torch.tensor([1, 0]).cuda())
        rest, _ = read_in_chunks(model, ids[[1, 0], 60:].cuda(), (30, 1, 7), cache=cache)
        close(torch.cat((actual, rest[[1, 0]]), dim=1).cpu(), expected)
        held = cache.memories()[0].segments[0].tensors["keys"]
        assert (held.is_cuda, held.is_pinned()) == (storage == "device", storage == "cpu")


@torch.no_grad()
def test_eight_bits(mode):
    """Every number is within half a level of its scale; the model's output moves a little, the memory is a quarter."""
    ids = random_ids(1, 80)
    expected, plain = read_in_chunks(converted(mode), ids, (40,))
    actual, small = read_in_chunks(converted(replace(mode, bits=8)), ids, (40,))
    tensors, exact = (cache.layers[0].memory.segments[0].tensors for cache in (small, plain))
    for name in ("keys", "values"):
        assert tensors[name].dtype == torch.int8
        rounded = tensors[name] * tensors[f"{name}_scale"]
        assert (rounded - exact[name]).abs().le(0.51 * tensors[f"{name}_scale"])[:, :, :80].all()
    assert tensors["keys"].nbytes * 4 == exact["keys"].nbytes
    assert not torch.equal(actual, expected)
    agree = actual.argmax(-1) == expected.argmax(-1)
    assert agree.float().mean() > 0.8


@pytest.mark.parametrize("queries", [1, 5, None])
@torch.no_grad()
def test_max_tokens_bounds_the_memory(mode, queries, short_segments):
    """However long the text, and read in one forward too unless every query recalls; representatives included."""
    most = 20
    model, chunk = converted(replace(mode, max_tokens=most, queries=queries)), 10
    asking = queries or chunk
    segments = -(-(most + WINDOW + 8 + asking + chunk) // 16) + 1
    key_bytes = 2 * 16 * 4  # of one token
    blocks = 0 if mode.block_tokens == 1 else 2 * key_bytes * 16 // mode.block_tokens
    bound = segments * (16 * 2 * key_bytes + blocks)
    ids, cache, held = random_ids(1, 400), LambdaCache(model.config), []
    for start in range(0, 400, chunk):
        model(ids[:, start : start + chunk], past_key_values=cache)
        held.append(cache.memories()[0].nbytes)
    assert max(held) <= bound
    assert max(held[-8:]) == max(held[-16:-8])  # sixteen forwards, ten segments
    recalled = model.longpatch.recalled(cache)[0]
    latest = 400 - 1 - WINDOW
    assert recalled.max() <= latest
    last_query = recalled[:, :, -1]
    assert last_query[last_query >= 0].min() > latest - most

    whole = model(ids).past_key_values
    read_in_chunks(model, random_ids(1, 2), (1,), cache=whole)
    assert whole.memories()[0].nbytes <= bound
    if queries is not None:
        assert model(ids).past_key_values.memories()[0].nbytes <= bound


@pytest.mark.parametrize("storage", ["device", "disk"])
@torch.no_grad()
def test_taking_back_beams_and_batches(mode, storage):
    model = converted(replace(mode, storage=storage))
    ids = random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    _, cache = read_in_chunks(model, ids[:, :66], (66,), mask)
    cache.crop(-6)
    close(read_in_chunks(model, ids[:, 60:], (10,), mask, cache)[0][0], whole[0, 60:])
    cache.crop(-8)
    cache.batch_repeat_interleave(2)
    close(read_in_chunks(model, ids[[0, 0, 1, 1], 62:64], (1,), mask[[0, 0, 1, 1]], cache)[0][0], whole[0, 62:64])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert model.longpatch.recalled(cache)[0].shape[0] == 2
    close(read_in_chunks(model, ids[[1, 0], 64:], (6,), mask[[1, 0]], cache)[0], whole[[1, 0], 64:])
    cache.reset()
    close(read_in_chunks(model, ids, (70,), mask, cache)[0][0], whole[0])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(mode):
    model, ids = converted(mode), random_ids(3, 80)
    lengths = torch.tensor([80, 61, 5])
    mask = (torch.arange(80) >= (80 - lengths)[:, None]).long()
    logits, _ = read_in_chunks(model, ids, (30, 2, 9), mask)
    for row, length in enumerate(lengths.tolist()):
        close(logits[row, 80 - length :], model(ids[row : row + 1, 80 - length :], use_cache=False).logits[0])
    right = mask.flip(1)
    logits = model(ids, attention_mask=right).logits
    close(logits[1, :61], model(ids[1:2, :61], use_cache=False).logits[0])


@torch.no_grad()
def test_a_continued_generation_and_the_last_query_alone():
    """Two turns are what a loop by hand says; by default only the last query of a forward recalls."""
    model, first, second = converted(Recall(top_k=4)), random_ids(1, 30), random_ids(1, 1, seed=1)
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 25}
    turn = model.generate(first, **options)
    text = torch.cat((turn.sequences, second), dim=1)
    again = model.generate(text, past_key_values=turn.past_key_values, **options)
    ids, cache, new = first, None, first
    for said in (turn, again):
        for _ in range(25):
            output = model(new, past_key_values=cache)
            cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), dim=1)
        assert torch.equal(ids, said.sequences)
        ids, new = torch.cat((ids, second), dim=1), torch.cat((new, second), dim=1)  # the last word was not read yet
    plain, recalling = (converted(recall)(first, use_cache=False).logits for recall in (None, Recall(top_k=4)))
    close(recalling[:, :-1], plain[:, :-1])
    assert (recalling[:, -1] - plain[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_drafts(mode):
    """The same text where every query recalls; where only the last does, they are refused before anything is read."""
    ids = random_ids(1, 40).repeat(1, 2)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    model = converted(mode)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=6, **options), expected)
    model = converted(replace(mode, queries=1))
    cache = LambdaCache(model.config)
    for drafts in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": tiny_llama(1)}):
        with pytest.raises(LongpatchError, match=r"drafts with recall\.queries=1.*Recall\(queries=None\)"):
            model.generate(ids, past_key_values=cache, **drafts, **options)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_recalled_tells_what_was_recalled():
    """The tokens told are those with the best scores, by the raw queries and keys of the layer."""
    model = converted(Recall(top_k=4, distance=7, from_layer=1))
    frequencies = model.longpatch.rotary.frequencies
    seen = record_attention(model)
    output = model(random_ids(1, 60))
    recalled = model.longpatch.recalled(output.past_key_values)
    assert list(recalled) == [1]
    query, key = (seen[1][name][0].double().unflatten(2, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    q, k = (torch.complex(x[..., :8], x[..., 8:]) for x in (query[:, :, -1], key.repeat_interleave(2, 1)))
    scores = torch.einsum("bhf,bhjf,f->bhj", q, k.conj(), torch.polar(torch.ones(8).double(), 7 * frequencies)).real
    best = scores[..., SINKS : 60 - WINDOW].topk(4).indices + SINKS
    assert torch.equal(recalled[1][:, :, 0].sort().values, best.sort().values)
    with pytest.raises(LongpatchError, match="without recall"):
        converted(None).longpatch.recalled(output.past_key_values)
    with pytest.raises(LongpatchError, match=r"cache is a NoneType.*use_cache=True"):
        model.longpatch.recalled(model(random_ids(1, 60), use_cache=False).past_key_values)


@pytest.mark.parametrize("family", [*CASES, *SCALED])
@torch.no_grad()
def test_every_family_equals_its_definition(family, mode):
    """Interleaved, partial, stretched, no rotation, soft-caps, sliding layers, the bias of ALiBi; read in two ways."""
    recall, first, ids = replace(mode, distance=7), torch.tensor([0, 6]), distinct_ids(2, 60)
    mask = (torch.arange(60) >= first[:, None]).long()
    expected = reference_model(family, WINDOW, SINKS, WINDOW + 2, first, recall)(ids).logits[mask.bool()]
    model = convert_model(tiny_model(family), WINDOW, SINKS, limit_distance=WINDOW + 2, recall=recall)
    torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected, **NEAR)
    logits, cache = read_in_chunks(model, ids, (30, 1, 1, 28), mask)
    torch.testing.assert_close(logits[mask.bool()], expected, **NEAR)
    assert model.longpatch.recalled(cache)


def test_gradients_flow_through_the_queries(mode):
    model, ids = converted(mode).train(), random_ids(1, 60)
    model(ids, labels=ids, use_cache=False).loss.backward()
    with_recall = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(gradient.isfinite().all() for gradient in with_recall)
    plain = converted(None).train()
    plain(ids, labels=ids, use_cache=False).loss.backward()
    gaps = [(a - b.grad).abs().max() for a, b in zip(with_recall, plain.parameters(), strict=True)]
    assert max(gaps) > 1e-4


def test_settings_are_saved_and_refused(tmp_path):
    recall = Recall(top_k=7, distance=5)
    converted(recall).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["longpatch"]["recall"]["top_k"] == 7
    again = convert_model(type(tiny_llama()).from_pretrained(tmp_path))
    assert again.longpatch.config.recall == recall
    with pytest.raises(LongpatchError, match=r"top_k=0.*storage='tape'.*bits=4"):
        Recall(top_k=0, storage="tape", bits=4)
    for name, value in (("block_tokens", 3), ("max_tokens", 4), ("folder", "x"), ("distance", -1), ("queries", True)):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(LongpatchError, match=name):
            Recall(**wrong)
    with pytest.raises(LongpatchError, match="block_tokens=16 must be at most local_branch"):
        converted(Recall(block_tokens=16))
    with pytest.raises(LongpatchError, match="none of the model's 2 layers"):
        converted(Recall(from_layer=2))
    with pytest.raises(LongpatchError, match=r"from layer 0 to 1 covers none.*sliding never recall"):
        convert_model(tiny_model("gemma3_text"), WINDOW, SINKS, recall=Recall(to_layer=1))
    for name in ("top_k", "block_tokens"):
        with pytest.raises(LongpatchError, match=f"{name}=None must be an integer"):
            Recall.parse(f"{name}=None,max_tokens=9")
    model = tiny_llama()
    for wrong in (True, 5, 0, "default", {"top_k": 3}):
        with pytest.raises(LongpatchError, match=re.escape(f"recall={wrong!r} must be a Recall, False or None")):
            convert_model(model, WINDOW, SINKS, recall=wrong)
    with pytest.raises(LongpatchError, match="folder=5 must be a path"):
        Recall(storage="disk", folder=cast(Any, 5))
    with pytest.raises(LongpatchError, match=r"recall\.folder=.*missing' is no folder"):
        convert_model(model, WINDOW, SINKS, recall=Recall(storage="disk", folder=tmp_path / "missing"))
    convert_model(model, WINDOW, SINKS, recall=Recall(storage="disk", folder=tmp_path)).save_pretrained(tmp_path)
    assert convert_model(type(model).from_pretrained(tmp_path)).longpatch.config == model.longpatch.config
    model, ids = converted(Recall()), random_ids(2, 30)
    with pytest.raises(LongpatchError, match="needs a memory"):
        model(ids, past_key_values=DynamicCache())
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with pytest.raises(LongpatchError, match="right padding"):
        model(ids, attention_mask=mask)


def test_settings_as_text():
    """What a command line says, and what records and tables call it."""
    recall = Recall.parse("top_k=20,queries=None,storage=disk,folder=/tmp,bits=8")
    assert recall == Recall(top_k=20, queries=None, storage="disk", folder="/tmp", bits=8)
    assert Recall.parse(str(recall)) == recall
    assert (str(Recall()), Recall.parse("default")) == ("default", Recall())
    with pytest.raises(LongpatchError, match=r"'k=3' is not a setting; 'bits' is not a setting.*top_k=\.\.\."):
        Recall.parse("k=3,top_k=2,bits")
    with pytest.raises(LongpatchError, match="top_k='many'"):
        Recall.parse("top_k=many")


@pytest.mark.parametrize(("window", "distance"), [(12, 6), (130, 64)])
@torch.no_grad()
def test_the_default_distance(window, distance, mode):
    """64 tokens, or half the window if that is less."""
    ids = random_ids(1, window + 30)
    default, given, other = (
        convert_llama_model(tiny_llama(), window, SINKS, recall=replace(mode, distance=d))(ids).logits
        for d in (None, distance, distance + 1)
    )
    assert torch.equal(default, given)
    assert (default - other).abs().max() > 1e-3


def test_recall_from_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    arguments = parser.parse_args(["--local-branch", "12", "--global-branch", "3", "--recall", "top_k=4,distance=5"])
    model = tiny_llama()
    arm, (baseline,) = converted_arm(model, conversion_settings(arguments)), parse_arms("12/3")
    assert arm.label == "12/3 recall=top_k=4,distance=5"
    with arm.applied(model):
        assert model.longpatch.config.recall == Recall(top_k=4, distance=5)
    with baseline.applied(model):
        assert model.longpatch.config.recall is None
    converted(Recall()).save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    for flags, recall in (([], Recall()), (["--recall", "none"], None)):
        settings = conversion_settings(parser.parse_args(flags))
        assert convert_model(saved, **settings).longpatch.config.recall == recall


def test_a_saved_recall_can_be_left_out(tmp_path):
    converted(Recall(top_k=7)).save_pretrained(tmp_path)
    model = convert_model(type(tiny_llama()).from_pretrained(tmp_path), recall=False)
    assert model.longpatch.config.recall is None
    assert convert_model(model).longpatch.config.recall is None


def test_adapters(mode):
    """A LoRA before or after conversion: the same logits, recall included, and not those without recall."""
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, init_lora_weights=False)

    def adapter(model):
        torch.manual_seed(3)
        return get_peft_model(model, settings).eval()

    first = adapter(converted(mode))
    then = convert_model(adapter(tiny_llama()), WINDOW, SINKS, slack=8, recall=mode)
    without, ids = adapter(converted(None)), random_ids(1, 60)
    with torch.no_grad():
        expected = first(ids).logits
        close(then(ids).logits, expected)
        close(read_in_chunks(first, ids, (20, 1, 9))[0], expected)
        assert (without(ids).logits - expected).abs().max() > 1e-3
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(first.generate(input_ids=ids, **options), then.generate(input_ids=ids, **options))


@pytest.mark.parametrize("change", [{}, {"max_tokens": 20}, {"bits": 8, "storage": "disk"}], ids=str)
@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(mode, change, short_segments, tmp_path):
    """Each has its files: the copy writes other text, the original goes on, and the copy outlives it."""
    folder = {"folder": str(tmp_path)} if "storage" in change else {}
    model, ids = converted(replace(mode, **change, **folder)), random_ids(1, 80)
    cache = read_in_chunks(model, ids[:, :60], (20,))[1]
    twin = copy.deepcopy(cache)
    assert model.longpatch.recalled(twin).keys() == {0, 1}
    read_in_chunks(model, random_ids(1, 20, 5), (4,), cache=twin)
    twin.crop(-8)
    expected = read_in_chunks(model, ids, (20, 20, 20, *[4] * 5))[0]
    close(read_in_chunks(model, ids[:, 60:], (4,), cache=cache)[0], expected[:, 60:])
    before = read_in_chunks(model, random_ids(1, 8, 6), (4,), cache=copy.deepcopy(twin))[0]
    del cache
    gc.collect()
    close(read_in_chunks(model, random_ids(1, 8, 6), (4,), cache=twin)[0], before)
    if "storage" in change:
        with pytest.raises(LongpatchError, match=r"storage='disk' go with their cache.*deepcopy"):
            pickle.dumps(twin)
    del twin
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{}, {"bits": 8}, {"storage": "disk"}], ids=["as it is", "8 bits", "disk"])
@torch.no_grad()
def test_a_cache_in_a_file_keeps_what_it_remembers(mode, change, tmp_path, short_segments):
    model, ids = converted(replace(mode, **change)), random_ids(2, 60)
    _, cache = read_in_chunks(model, ids[:, :50], (20,))
    save_cache(cache, tmp_path / "cache.safetensors")
    again = load_cache(model, tmp_path / "cache.safetensors")
    expected, _ = read_in_chunks(model, ids[:, 50:], (4,), cache=cache)
    close(read_in_chunks(model, ids[:, 50:], (4,), cache=again)[0], expected)
    assert model.longpatch.recalled(again)[0].max() >= SINKS


@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_bytes_are_those_of_the_formula(mode, bits, monkeypatch):
    """Sinks and ring, and in every layer whole segments; block mode: two keys in float32 a block that was left."""
    for module in (memory, blocks, search, segment):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", 64)
    model = converted(replace(mode, bits=bits, queries=1))
    cache = LambdaCache(model.config)
    read_in_chunks(model, random_ids(2, 400), (400, 1), cache=cache)
    layers, rows, heads, dim, number = 2, 2, 2, 16, 4 if bits is None else 1 + 4 / 16
    ring = 2 * rows * heads * dim * 4 * (2 * SINKS + WINDOW + 8)
    for count in (400, 460):
        if count > 400:
            read_in_chunks(model, random_ids(2, 60), (1,), cache=cache)
        remembered = 2 * rows * heads * dim * number * 64 * -(-(count - SINKS) // 64)
        if mode.block_tokens > 1:
            left = -(-(count - SINKS - WINDOW) // 64)  # segments with a token that left the window
            remembered += 2 * rows * heads * dim * 4 * left * 64 // mode.block_tokens
        assert cache_bytes(cache) == layers * (ring + remembered)


@torch.no_grad()
def test_a_line_hidden_in_a_haystack(mode):
    """What the benchmark reads piece by piece and cuts short is what the prompt read whole gives, for all lengths."""
    model, ids, line = converted(NOTHING), random_ids(1, 200)[0], random_ids(1, 7, seed=1)[0]
    question, answer = random_ids(1, 5, seed=2)[0], random_ids(1, 3, seed=3)[0]
    haystack, settings, gaps = Haystack(model, ids, 30), replace(mode, queries=1), []
    for _ in range(2):
        for start, end in ((9, 190), (40, 60), (40, 150), (120, 190)):
            kept = haystack.hide(line, start, 2 * WINDOW)
            behind = haystack.keep(end, 200)
            haystack.cut(end)
            actual = ask(model, haystack.cache, question, answer, settings)
            haystack.restore(behind)
            haystack.restore(kept)
            prompt = torch.cat((ids[:start], line, ids[start + len(line) : end]))
            whole = Haystack(model, prompt, 50)
            close(actual, ask(model, whole.cache, question, answer, settings))
            unhidden = ask(model, Haystack(model, ids[:end], 50).cache, question, answer, settings)
            gaps.append((actual - unhidden).abs().max())
    assert max(gaps) > 1e-3
