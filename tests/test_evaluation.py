"""Every token is scored once, and however the text is cut, by the same rule."""

import json
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from longpatch import LongpatchError, convert_llama_model
from longpatch.demo import load
from longpatch.evaluation.arms import Arm
from longpatch.evaluation.cachefile import load_cache, save_cache
from longpatch.evaluation.documents import Document, read_documents
from longpatch.evaluation.perplexity import bits_per_byte, perplexity, sliding_scores, stream_nll, window_nll
from longpatch.evaluation.reading import Moments, Reading, document_samples, doubling_edges, measure_positions
from longpatch.evaluation.run import Sample, Work
from tests.families import tiny_model
from tests.tiny import random_ids, tiny_llama

BOS = 0


@torch.no_grad()
def dense(model, ids):
    return cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_streamed_text_is_scored_as_in_one_forward(converted, chunk):
    model, ids = tiny_llama(), random_ids(1, 65)[0]
    if converted:
        convert_llama_model(model, 16, 4)
    chunks = list(stream_nll(model, ids, chunk))
    torch.testing.assert_close(torch.cat([c.nll for c in chunks]), dense(model, ids), atol=3e-4, rtol=1e-4)
    assert [c.start for c in chunks] == list(range(0, 64, chunk))


@pytest.mark.parametrize("bos", [BOS, None])
def test_fresh_windows_know_nothing_of_each_other(bos):
    model, ids, window = tiny_llama(), random_ids(1, 50)[0], 16
    actual = torch.cat(list(window_nll(model, ids, window, bos, batch=2)))
    before = ids[:-1:15] if bos is None else [torch.tensor(bos)] * 4
    pieces = zip(before, ids[1:].split(window - 1), strict=True)
    expected = torch.cat([dense(model, torch.cat((first[None], piece))) for first, piece in pieces])
    assert len(actual) == len(ids) - 1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def demo():
    return load()


def document(words=400):
    return Document("a", " ".join(f"word {number} of a plain text," for number in range(words)))


def measured(model, tokenizer, sample, arm=Arm("original"), chunk=64, edges=(0,)):  # noqa: B008
    found = measure_positions(model, tokenizer, Reading(edges, chunk), arm, sample, Work(lambda n: None))
    return {(m.metric, m.settings.get("start")): m for m in found}


def test_perplexity_is_that_of_a_plain_loop(demo):
    """The loss that transformers itself gives for the whole text, to 1e-6, on an unconverted model."""
    model, tokenizer = demo
    (sample,) = document_samples([document()], tokenizer, 250)
    ids = sample.content["ids"]
    assert ids[0] == tokenizer.bos_token_id
    with torch.no_grad():
        expected = model(ids[None], labels=ids[None]).loss.item()
    found = measured(model, tokenizer, sample)
    assert found["nll_document", None].value == pytest.approx(expected, rel=1e-6)
    bits = found["bits_per_byte", None]
    assert bits.value * bits.n == pytest.approx(expected * 249 / 0.6931471805599453, rel=1e-6)
    assert bits.n == len(tokenizer.decode(ids[1:]).encode())


def test_spans_are_spans_of_the_same_tokens(demo):
    model, tokenizer = demo
    (sample,) = document_samples([document()], tokenizer, 200)
    nll = dense(model, sample.content["ids"])
    found = measured(model, tokenizer, sample, edges=(0, 50, 130))
    for start, stop in ((0, 50), (50, 130), (130, 199)):
        span = found["nll", start]
        assert (span.settings["stop"], span.n) == (stop, stop - start)
        assert span.value == pytest.approx(nll[start:stop].double().mean().item(), rel=1e-4)
        variance = nll[start:stop].double().var(correction=0).item()
        assert span.detail["variance"] == pytest.approx(variance, rel=1e-3)


def test_texts_that_end_in_a_span_are_pooled_with_the_others(demo):
    model, tokenizer = demo
    for length in (60, 90, 130):
        (sample,) = document_samples([document()], tokenizer, length)
        found = measured(model, tokenizer, sample, edges=(0, 50, 130))
        span = found["nll", 50]
        assert (span.settings["stop"], span.n) == (130, length - 51)


def test_texts_without_a_token_to_predict_are_refused(demo):
    texts = [document(), Document("empty", ""), Document("b", "more")]
    with pytest.raises(LongpatchError, match="documents: empty has no token to predict"):
        document_samples(texts, demo[1], None)
    with pytest.raises(LongpatchError, match="a has no token to predict; empty has"):
        document_samples(texts, demo[1], 1)


def test_fresh_arms_score_the_same_tokens(demo):
    model, tokenizer = demo
    (sample,) = document_samples([document()], tokenizer, 200)
    found = measured(model, tokenizer, sample, Arm("fresh:64", window=64))
    expected = torch.cat(list(window_nll(model, sample.content["ids"], 64, tokenizer.bos_token_id)))
    assert found["nll_document", None].n == 199
    assert found["nll_document", None].value == pytest.approx(expected.double().mean().item(), rel=1e-6)


def test_a_text_read_again_and_again(demo):
    _, tokenizer = demo
    once, thrice = (document_samples([document()], tokenizer, 40, repeat)[0].content["ids"] for repeat in (1, 3))
    assert torch.equal(thrice, torch.cat((once, once[1:], once[1:])))


def test_as_many_tokens_as_asked_for_where_each_is_long(demo):
    text = " " * 20_000 + "The ship went on."
    ids = Document("a", text).ids(demo[1])
    assert 200 < len(ids) < 20_000 / 16
    assert torch.equal(Document("a", text).ids(demo[1], 200), ids[:200])


def test_doubling_spans():
    assert doubling_edges(256, 4096) == (0, 256, 512, 1024, 2048, 4096)
    assert doubling_edges(256, 257) == (0, 256, 512)
    assert doubling_edges(256, 100) == (0, 256)


def test_moments_do_not_depend_on_the_cut():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    whole, parts = Moments(), Moments()
    whole.add(values)
    for part in values.split(37):
        parts.add(part)
    assert (parts.n, whole.n) == (1000, 1000)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)
    assert parts.squares / 1000 == pytest.approx(values.var(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize(("length", "stride", "context"), [(16, 4, None), (16, 16, 8), (16, 5, 6), (100, 7, None)])
def test_sliding_windows(length, stride, context):
    """Every token scored once ("new"), each by the window that the definition names."""
    model, ids = tiny_llama(), random_ids(1, 60)[0]
    expected, scored = [], 0
    for start in range(0, 59, stride):
        stop = min(start + length, 59)
        parts = [
            dense(model, ids[f : min(f + (context or length), stop) + 1]) for f in range(start, stop, context or length)
        ]
        expected.append(torch.cat(parts)[max(0, scored - start) :])
        scored = stop
        if stop == 59:
            break
    scores = list(sliding_scores(model, ids, length, stride, context))
    torch.testing.assert_close(torch.cat([s.nll for s in scores]), torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert sum(len(s.correct) for s in scores) == 59


def test_sliding_windows_that_score_all():
    model, ids = tiny_llama(), random_ids(1, 60)[0]
    scores = list(sliding_scores(model, ids, 16, 8, new_only=False))
    assert [len(s.nll) for s in scores] == [16] * 6
    torch.testing.assert_close(scores[2].nll, dense(model, ids[16:33]), atol=1e-4, rtol=1e-4)
    assert torch.equal(scores[2].correct, model(ids[None, 16:32]).logits[0].argmax(-1) == ids[17:33])


def test_documents(tmp_path, demo):
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "id": "first"}) + "\n", encoding="utf-8")
    ids = torch.arange(300, 310)
    (tmp_path / "c.bin").write_bytes(b"".join(int(i).to_bytes(2, "little") for i in ids))
    found = read_documents([tmp_path])
    assert [d.name for d in found] == ["first", "b.txt", "c.bin"]
    assert torch.equal(found[2].ids(demo[1], 5), ids[:5])
    assert [d.name for d in read_documents([tmp_path], start=1, limit=1)] == ["b.txt"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("another two", encoding="utf-8")
    same = read_documents([tmp_path / "b.txt", tmp_path / "more"])
    assert [d.identity["document"] for d in same] == ["b.txt"] * 2
    assert len({d.identity["digest"] for d in [*found, *same]}) == 4
    with pytest.raises(LongpatchError, match="nowhere"):
        read_documents([tmp_path / "nowhere.txt"])
    with pytest.raises(LongpatchError, match="past the last of 3"):
        read_documents([tmp_path], start=3)


def test_reading_goes_on_where_it_was_killed(tmp_path, demo):
    """A long document, killed after its state was kept: the numbers are those of an undisturbed reading, exactly."""
    model, tokenizer = demo
    (sample,) = document_samples([document(2000)], tokenizer, 3000)
    arm = Arm("64/4", {"local_branch": 64, "global_branch": 4})
    reading = Reading((0, 1000, 2000), 128, save_every=1000)
    measure = partial(measure_positions, model, tokenizer, reading, arm, sample)

    class Killed(Exception):
        pass

    def die_late(total=[0]):  # noqa: B006
        def tick(tokens):
            total[0] += tokens
            if total[0] > 2300:
                raise Killed

        return tick

    with arm.applied(model):
        undisturbed = measure(Work(lambda n: None))
        with pytest.raises(Killed):
            measure(Work(die_late(), tmp_path / "state"))
        read = json.loads((tmp_path / "state" / "state.json").read_text())["read"]
        assert read == 2048
        ticks = []
        resumed = measure(Work(ticks.append, tmp_path / "state"))
    assert resumed == undisturbed
    assert ticks[0] == read
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-mixed", "gptj"])
def test_a_saved_cache_goes_on_where_layers_slide(tmp_path, name):
    model, ids = tiny_model(name), random_ids(1, 60)[0]
    whole = torch.cat([chunk.nll for chunk in stream_nll(model, ids, 10)])
    *_, (read, cache) = [(chunk.start + 10, chunk.cache) for chunk in stream_nll(model, ids[:51], 10)]
    save_cache(cache, tmp_path / "cache.safetensors")
    again = load_cache(model, tmp_path / "cache.safetensors")
    rest = torch.cat([chunk.nll for chunk in stream_nll(model, ids[read:], 10, again)])
    assert torch.equal(rest, whole[read:])


def test_the_state_of_another_document_is_not_taken(tmp_path, demo):
    model, tokenizer = demo
    (sample,) = document_samples([document(500)], tokenizer, 500)
    other = Sample({}, {"document": "b"}, sample.content, sample.size)
    arm, reading = Arm("original"), Reading((0,), 64, save_every=100)
    seen = []

    def tick(tokens):
        seen.append(tokens)
        if sum(seen) > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_positions(model, tokenizer, reading, arm, other, Work(tick, tmp_path / "state"))
    ticks = []
    measure_positions(model, tokenizer, reading, arm, sample, Work(ticks.append, tmp_path / "state"))
    assert ticks[0] == 0


def test_units():
    nll = torch.full((8,), torch.log(torch.tensor(4.0)).item())
    assert perplexity(nll) == pytest.approx(4.0)
    assert bits_per_byte(nll, text_bytes=4) == pytest.approx(4.0)  # 8 tokens of 2 bits over 4 bytes
