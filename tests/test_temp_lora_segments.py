"""Segments: what a prompt shows, what is learned, and which files are read."""

import json

import pytest

from longpatch import LongpatchError, TempLoraGenerator
from longpatch.demo import load
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


def test_guofeng_and_plain_rows_are_read(tmp_path):
    pairs = [{"zh": str(n), "en": f"e{n}"} for n in range(4)]
    guofeng = [{"contexts": {"k1": pairs[1:2], "k3": pairs[:2]}, "inference": pairs[2:]}]
    (tmp_path / "a.eval").write_text(json.dumps(guofeng), encoding="utf-8")
    assert read_segments(tmp_path / "a.eval") == [Segment("2", "e2", (("0", "e0"), ("1", "e1"))), Segment("3", "e3")]
    assert read_segments(tmp_path / "a.eval", "k1")[0].before == (("1", "e1"),)
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
