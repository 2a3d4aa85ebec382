"""Recall against its dense float64 definition, from each layer's own raw queries, keys and values."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from benchmarks.haystack import NOTHING, Haystack, ask
from longpatch import LambdaCache, LongpatchError, Recall, convert_llama_model, convert_model
from longpatch.recall import memory, search
from tests.families import CASES, SCALED, reference_model, tiny_model
from tests.recalling import NEAR, SINKS, WINDOW, both_modes, close, converted, definition
from tests.test_definition import record_attention
from tests.tiny import distinct_ids, random_ids, read_in_chunks, tiny_llama

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


@both_modes
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


@both_modes
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


@both_modes
def test_recall_matters(mode):
    """What the other tests compare is not what the model computes without recall."""
    ids = random_ids(1, 60)
    with torch.no_grad():
        gap = converted(mode)(ids).logits - converted(None)(ids).logits
    least = mode.top_k if mode.block_tokens == 1 else 1
    recalls = torch.arange(60) >= WINDOW + SINKS + least - 1
    assert gap[0, recalls].abs().amax(-1).gt(1e-3).sum() > 0.9 * recalls.sum()
    close(gap[0, ~recalls], torch.zeros_like(gap[0, ~recalls]))


@both_modes
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


@both_modes
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


@both_modes
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


@both_modes
def test_gradients_flow_through_the_queries(mode):
    model, ids = converted(mode).train(), random_ids(1, 60)
    model(ids, labels=ids, use_cache=False).loss.backward()
    with_recall = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(gradient.isfinite().all() for gradient in with_recall)
    plain = converted(None).train()
    plain(ids, labels=ids, use_cache=False).loss.backward()
    gaps = [(a - b.grad).abs().max() for a, b in zip(with_recall, plain.parameters(), strict=True)]
    assert max(gaps) > 1e-4


@both_modes
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


@both_modes
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
