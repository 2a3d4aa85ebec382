"""Segments: what a prompt shows, what is learned, and which files are read."""

import json

import pytest
import torch
from transformers import LogitsProcessor

from longpatch import LongpatchError, TempLoraGenerator
from longpatch.demo import load
from longpatch.evaluation.translation import segment_samples
from longpatch.temp_lora import Learner, Segment, generate_segments, read_segments
from longpatch.temp_lora.segments import chat_template, pairs_template
from tests.test_temp_lora import assert_same, snapshot

LEARN = {"rank": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def demo():
    return load()


def test_prompts_show_recent_pairs():
    shown = []
    plain = pairs_template("A", "B")

    def template(pairs, source):
        shown.append(list(pairs))
        return plain(pairs, source)

    assert plain([("one", "two")], "three") == "A: one\nB: two\n\nA: three\nB:"
    segments = [Segment(f"s{n}", f"r{n}") for n in range(4)]
    segments[2] = Segment("s2", "r2", (("x", "y"),))
    model, tokenizer = load()
    answers = list(
        generate_segments(
            model, tokenizer, segments, template=template, pairs=2, train_on="reference", max_new_tokens=3, learn=LEARN
        )
    )
    assert len(answers) == 4
    assert shown == [[], [("s0", "r0")], [("x", "y")], [("x", "y"), ("s2", "r2")]]


@pytest.mark.parametrize("train_on", ["output", "reference"])
def test_the_answer_alone_is_learned(demo, train_on, monkeypatch):
    model, tokenizer = demo
    learned = []
    original = Learner.learn

    def learn(self, context_ids, new_ids, **options):
        learned.append((tokenizer.decode(context_ids[0]), tokenizer.decode(new_ids[0])))
        return original(self, context_ids, new_ids, **options)

    monkeypatch.setattr(Learner, "learn", learn)
    before = snapshot(model)
    generator = TempLoraGenerator(model, **LEARN)
    answers = list(
        generator.generate_segments(
            [Segment("The old king", "is dead")], tokenizer, train_on=train_on, max_new_tokens=8, do_sample=False
        )
    )
    expected = "is dead" if train_on == "reference" else answers[0].output
    ((context, new),) = learned
    assert context.endswith("The old king\nEnglish:")
    assert new == f" {expected}\n"
    assert len(answers[0].losses) == 2
    assert "\n" not in answers[0].output
    assert_same(before, snapshot(model))


def test_learning_makes_a_repeated_reference_likelier(demo):
    model, tokenizer = demo
    segments = [Segment("Bonjour", "Quizzical zebras jog")] * 4
    answers = list(
        generate_segments(
            model, tokenizer, segments, pairs=0, train_on="reference", max_new_tokens=2, learn=LEARN | {"rank": 16}
        )
    )
    losses = [answer.losses[0] for answer in answers]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def rows_of_a_book():
    """As in the published files: the contexts of a row are the pairs before it, earlier rows' inference among them."""
    pairs = [{"zh": str(n), "en": f"e{n}"} for n in range(16)]
    return [
        {"contexts": {"k1": pairs[n - 5 : n], "k3": pairs[max(0, n - 15) : n]}, "inference": pairs[n : n + 2]}
        for n in (10, 12, 14)
    ]


GUOFENG = rows_of_a_book()


@pytest.mark.parametrize("train_on", ["output", "reference"])
@pytest.mark.parametrize(("context", "pairs"), [("k1", None), ("k3", None), ("k3", 2)])
def test_what_is_to_be_translated_is_not_shown_before(demo, context, pairs, train_on, tmp_path):
    (tmp_path / "a.eval").write_text(json.dumps(GUOFENG), encoding="utf-8")
    shown = []

    def template(pairs, source):
        shown.append(list(pairs))
        return source

    segments = read_segments(tmp_path / "a.eval", context)
    settings = {"pairs": pairs, "train_on": train_on, "max_new_tokens": 1, "learn": LEARN | {"epochs": 1}}
    list(generate_segments(*demo, segments, template=template, **settings))
    expected = pairs or {"k1": 5, "k3": 10}[context]
    assert [len(found) for found in shown] == [expected] * 6
    references = {(segment.source, segment.reference) for segment in segments}
    told = [pair for found in shown for pair in found if pair in references]
    assert bool(told) == (train_on == "reference")


def test_a_special_token_ends_an_answer(demo):
    tokenizer = demo[1]
    said = [*tokenizer.encode(" good day", add_special_tokens=False), tokenizer.bos_token_id]
    said += tokenizer.encode(" and more", add_special_tokens=False)

    class Saying(LogitsProcessor):
        def __init__(self):
            self.left = list(said)

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.left.pop(0)]), 0.0)

    settings = {"max_new_tokens": 20, "eos_token_id": 1, "learn": LEARN}
    for stops, expected in (((tokenizer.bos_token,), "good day"), (("more",), "good day and")):
        saying = Saying()
        (answer,) = generate_segments(*demo, [Segment("a")], stop_strings=stops, logits_processor=[saying], **settings)
        assert answer.output == expected
        assert len(said) - len(saying.left) == (
            said.index(tokenizer.bos_token_id) + 1 if "<" in stops[0] else len(said)
        )


def test_between_two_answers_the_model_is_as_it_was(demo):
    model, _ = demo
    before = snapshot(model)
    answers = generate_segments(*demo, [Segment("a", "b")] * 2, train_on="reference", max_new_tokens=2, learn=LEARN)
    for _ in range(2):
        next(answers)
        assert_same(before, snapshot(model))


def test_settings_that_segments_have_no_use_for_are_refused(demo, tmp_path):
    model, tokenizer = demo
    generator = TempLoraGenerator(model, context_tokens=64, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(LongpatchError, match=r"context_tokens was set.*checkpoint_dir was set"):
        generator.generate_segments([Segment("a")], tokenizer)


def test_a_book_is_one_document():
    (book,) = segment_samples(GUOFENG, "k1")
    assert [segment.source for segment in book.content] == [str(n) for n in range(10, 16)]
    assert [len(segment.before) for segment in book.content] == [5, 0, 0, 0, 0, 0]
    rows = [{"id": name, "segments": [{"source": "a", "target": "b"}]} for name in "xy"]
    assert [sample.identity["document"] for sample in segment_samples(rows)] == ["x", "y"]


def test_guofeng_and_plain_rows_are_read(tmp_path):
    (tmp_path / "a.eval").write_text(json.dumps(GUOFENG), encoding="utf-8")
    pairs = [(str(n), f"e{n}") for n in range(16)]
    assert read_segments(tmp_path / "a.eval") == [
        Segment(zh, en, tuple(pairs[:10]) if zh == "10" else ()) for zh, en in pairs[10:]
    ]
    assert read_segments(tmp_path / "a.eval", "k1")[0].before == tuple(pairs[5:10])
    with pytest.raises(LongpatchError, match=r"no context 'k2'. Supported: k1, k3"):
        read_segments(tmp_path / "a.eval", "k2")
    rows = [{"source": "a", "reference": "b"}, {"source": "c", "target": "d"}, {"source": "e"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_segments(tmp_path / "b.jsonl") == [Segment("a", "b"), Segment("c", "d"), Segment("e")]
    (tmp_path / "c.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    with pytest.raises(LongpatchError, match="row 0"):
        read_segments(tmp_path / "c.jsonl")


def test_a_chat_template_gets_pairs_as_turns(demo):
    _, tokenizer = demo
    template = chat_template(tokenizer, "Say: ")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    try:
        assert template([("a", "b")], "c") == "[user]Say: a[assistant]b[user]Say: c[assistant]"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("settings", "reason"), [({"train_on": "both"}, "train_on='both'"), ({"train_on": "reference"}, "segment 1 has no")]
)
def test_bad_settings_are_refused(demo, settings, reason):
    segments = [Segment("a", "b"), Segment("c")]
    with pytest.raises(LongpatchError, match=reason):
        next(generate_segments(*demo, segments, **settings))
