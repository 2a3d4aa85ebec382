"""The walk over a document: what is scored before what is learned, resuming, buckets."""

import pytest
import torch

from longpatch import LongpatchError, convert_model
from longpatch.evaluation.buckets import by_length, by_position
from longpatch.evaluation.perplexity import stream_nll
from longpatch.evaluation.temp_lora import Walk, walk_document
from longpatch.temp_lora import LearnOptions
from tests.tiny import random_ids, tiny_llama

LEARN = LearnOptions(rank=4, alpha=8, dropout=0.0, learning_rate=3e-3)


def last(model, ids, walk, **options):
    document = None
    for document in walk_document(model, ids, walk, **options):  # noqa: B007
        pass
    assert document is not None
    return {arm: torch.cat(chunks) for arm, chunks in document.nll.items()}


def model(converted=True):
    return convert_model(tiny_llama(), 16, 4) if converted else tiny_llama()


@pytest.mark.parametrize("reuse", [1, 3, None])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_chunk_changes_no_score_before_it(reuse, dropout):
    ids = random_ids(1, 130)[0]
    walk = Walk(20, 30, (30, 50), reuse, LEARN.replace(dropout=dropout))
    expected = last(model(), ids, walk)
    altered = ids.clone()
    altered[80:100] = random_ids(1, 20, seed=1)[0]
    actual = last(model(), altered, walk)
    for arm in ("base", "30", "50"):
        assert torch.equal(actual[arm][1:80], expected[arm][1:80])
        assert actual[arm][0].isnan()
        assert not torch.equal(actual[arm][100:], expected[arm][100:])


@pytest.mark.parametrize("converted", [False, True])
def test_the_base_is_a_stream_and_no_learning_is_the_base(converted):
    ids = random_ids(1, 60)[0]
    walk = Walk(20, 64, (), None, LEARN.replace(learning_rate=0.0))
    scores = last(model(converted), ids, walk)
    stream = torch.cat([chunk.nll for chunk in stream_nll(model(converted), ids, 20)])
    torch.testing.assert_close(scores["base"][1:], stream, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores["64"][1:], stream, atol=1e-4, rtol=1e-4)


def test_learnings_own_first_forward_is_the_score():
    ids = random_ids(1, 90)[0]
    once = last(model(), ids, Walk(20, 30, (), 1, LEARN))["30"]
    # a dropout that drops nothing takes the long way
    twice = last(model(), ids, Walk(20, 30, (), 1, LEARN.replace(dropout=1e-12)))["30"]
    torch.testing.assert_close(once[1:], twice[1:], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_walk_that_was_cut_off_gives_the_same_scores(reuse, tmp_path):
    ids = random_ids(1, 130)[0]
    walk = Walk(20, 30, (30, 50), reuse, LEARN)
    expected = last(model(), ids, walk)
    for number, _ in enumerate(walk_document(model(), ids, walk, tmp_path, save_seconds=0)):
        if number == 3:
            break
    document = next(iter(walk_document(model(), ids, walk, tmp_path)))
    assert document.position == 60 or document.position == 80
    for _ in range(2):  # the second time everything is there
        actual = last(model(), ids, walk, checkpoint=tmp_path)
        for arm in expected:
            assert torch.equal(actual[arm][1:], expected[arm][1:])
    with pytest.raises(LongpatchError, match="another ids"):
        last(model(), ids.flip(0), walk, checkpoint=tmp_path)
    with pytest.raises(LongpatchError, match="another model"):
        last(model(converted=False), ids, walk, checkpoint=tmp_path)


def test_buckets():
    short, long = (
        torch.log(torch.tensor([float("nan"), 2, 2, 8])),
        torch.log(torch.tensor([float("nan"), 4, 4, 4, 4, 4])),
    )
    documents = [{"a": list(short.split(2))}, {"a": list(long.split(2))}]
    first, second = by_length(documents, [5])
    assert (first.tokens, second.tokens) == (3, 5)
    assert first.perplexity["a"] == pytest.approx(32 ** (1 / 3))
    assert first.chunk_mean["a"] == pytest.approx((1 * 2 + 2 * 4) / 3)  # chunks of 1 and 2 scored tokens: 2 and 4
    assert (second.perplexity["a"], second.chunk_mean["a"]) == pytest.approx((4.0, 4.0))
    positions = list(by_position(documents, 3, 2))
    assert [(found.start, found.stop, found.tokens) for found in positions] == [(0, 3, 4), (3, 6, 4)]
    assert positions[0].perplexity["a"] == pytest.approx((2 * 2 * 4 * 4) ** 0.25)
    assert [found.start for found in by_position(documents, 2, 2, start=2, end=6)] == [2, 4]
