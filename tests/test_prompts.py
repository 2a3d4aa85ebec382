"""Prompts of the length that was asked for, answers cut where they should be, metrics that are their libraries'."""

import http.server
import json
import math
import threading

import pytest
import torch

from longpatch import LongpatchError, convert_model
from longpatch.demo import load
from longpatch.endpoint import Endpoint
from longpatch.evaluation.arms import Arm
from longpatch.evaluation.attention import principal_components, recording
from longpatch.evaluation.judge import Judge
from longpatch.evaluation.metrics import best, bleu, contains, exact_number, rouge, similarity, token_f1
from longpatch.evaluation.needle import Needle, needle_samples
from longpatch.evaluation.passkey import WORDINGS, PassKey, passkey_samples
from longpatch.evaluation.prompts import Answerer, bury, chat_template, cut_at, cut_middle
from longpatch.evaluation.qa import extract
from longpatch.evaluation.topic import line_samples, topic_samples
from tests.families import tiny_model
from tests.tiny import random_ids, tiny_llama


@pytest.fixture(scope="module")
def answerer():
    model, tokenizer = load()
    return Answerer(model, tokenizer, chat_template(tokenizer), 12)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("placement", ["grid", "first-half"])
def test_passkeys_are_where_they_were_put(answerer, wording, placement):
    evaluation = PassKey.create(answerer, WORDINGS[wording], None)
    samples = passkey_samples([200, 300], [0.0, 0.5, 1.0], 2, 7, placement, 0)
    assert len(samples) == (12 if placement == "grid" else 4)
    for sample in samples:
        ids, depth = evaluation.prompt(sample)
        assert len(ids) == sample.settings["length"]
        assert answerer.tokenizer.decode(ids).count(sample.content["key"]) == 2
        assert abs(depth - sample.content["depth"]) < 0.25
        assert placement == "grid" or sample.content["depth"] < 0.5
    again = passkey_samples([200, 300], [0.0, 0.5, 1.0], 2, 7, placement, 0)
    assert [s.identity for s in again] == [s.identity for s in samples]
    others = passkey_samples([200, 300], [0.0, 0.5, 1.0], 2, 7, placement, 0, "Another filler.")
    assert not {s.identity["digest"] for s in others} & {s.identity["digest"] for s in samples}


def test_a_needle_in_a_haystack(answerer):
    text = "The sea was calm. The men slept below. A light was seen. " * 20
    evaluation = Needle.create(answerer, text, metrics=("match",))
    for sample in needle_samples([250], [0.0, 1.0], 1, 0):
        ids, depth = evaluation.prompt(sample)
        assert len(ids) == 250
        assert "Dolores Park" in answerer.tokenizer.decode(ids)
        assert abs(depth - sample.settings["depth"]) < 0.25


def test_needles_of_other_texts_are_other_samples():
    def of(*texts, seed=0):
        return {sample.identity["digest"] for sample in needle_samples([250], [0.0, 1.0], 2, seed, texts)}

    assert len(of("hay", "needle")) == 4
    assert of("hay", "needle") == of("hay", "needle")
    assert not of("hay", "needle") & (of("straw", "needle") | of("hay", "pin") | of("hay", "needle", seed=1))


def test_filler_is_repeated_and_the_needle_kept_whole():
    units = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    text, depth = bury(units, torch.tensor([9, 9]), 0.4, 12)
    assert text.tolist() == [1, 2, 3, 4, 5, 9, 9, 1, 2, 3, 4, 5]
    assert depth == 0.5
    with pytest.raises(LongpatchError, match="2 tokens of needle, 1 of room"):
        bury(units, torch.tensor([9, 9]), 0.4, 1)


def test_arms_answer_each_in_their_way(answerer):
    ids = torch.arange(100, 160)
    assert answerer.answer(Arm("constant:x", answer="x"), ids) == "x"
    cut = answerer.answer(Arm("truncate:20", keep=20), ids)
    assert cut == answerer.answer(Arm("original"), torch.cat((ids[:10], ids[-10:])))
    assert cut_middle(ids, 5).tolist() == [100, 101, 102, 158, 159]
    assert cut_middle(ids, 60) is ids
    assert cut_at("a b\nc", ("\n", "b")) == "a "


def test_templates(answerer, tmp_path):
    tokenizer = answerer.tokenizer
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for m in messages %}USER: {{ m.content }} {% endfor %}BOT:", encoding="utf-8")
    template = chat_template(tokenizer, str(jinja))
    ids = Answerer(None, tokenizer, template, 1).wrap(answerer.encode("hello"), " well")
    assert tokenizer.decode(ids) == "USER: hello BOT: well"
    with pytest.raises(LongpatchError, match="'nowhere' is no template"):
        chat_template(tokenizer, "nowhere")


def test_metrics_are_those_of_their_libraries():
    sacrebleu, scorer = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    answers = ["the cat sat on a mat", "he went home early today"]
    references = ["the cat sat on the mat", "he went home very early today"]
    assert bleu(answers, references) == sacrebleu.corpus_bleu(answers, [references]).score > 0
    expected = scorer.RougeScorer(["rougeL"], use_stemmer=True).score(references[0], answers[0])["rougeL"].fmeasure
    assert rouge(answers[0], references[0])["rougeL"] == expected == pytest.approx(5 / 6)
    assert token_f1("The big cat!", "a cat") == pytest.approx(2 / 3)
    assert best(token_f1, "yes", ["no", "Yes."]) == 1.0
    assert contains("Sit in the\nPark today.", " the park") == 1.0  # lines break where the book's do
    assert (exact_number("is 123. Then 45", "123"), exact_number("1234", "123")) == (1.0, 0.0)
    assert similarity("12395", "12345") == pytest.approx(0.8)
    assert extract("a b</Answer> c") == "a b"
    assert extract("x <Answer>b</Answer>") == "b"


def test_topics_and_lines():
    for sample in [*topic_samples([3], 2, 2, 0), *line_samples([20], 2, 0)]:
        prompt, target = sample.content
        assert prompt.count(target) == 1
    with_many = topic_samples([40], 1, 1, 0)[0]
    assert with_many.content[0].count("I would like to discuss the topic of") == 41


def test_a_judge_behind_an_endpoint():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "I say 10."}}]}).encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    judge = Judge(Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", timeout_s=2, retries=0))
    assert judge("Where?", "here", "there") == 1.0
    server.server_close()
    assert asked[0][0] == "/v1/chat/completions"
    assert "Reference answer: here" in asked[0][1]["messages"][0]["content"]
    with pytest.raises(LongpatchError, match=r"endpoint: http://127\.0\.0\.1"):
        judge("Where?", "here", "there")


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("On a scale of 1 to 10, I give it 9.", 9),
        ("9/10, since 3 of 3 facts agree", 9),
        ("7 out of 10", 7),
        ("8. It misses 2 of them.", 8),
        ("**10**", 10),
        ("Score: 8.5 / 10", 8.5),
    ],
)
def test_the_mark_in_a_judges_reply(reply, mark):
    assert Judge(lambda prompt: reply)("Where?", "here", "there") == (mark - 1) / 9


def test_a_reply_without_a_mark():
    with pytest.raises(LongpatchError, match="holds no number from 1 to 10"):
        Judge(lambda prompt: "In 1999, 0.5 of 200")("Where?", "here", "there")


@pytest.mark.parametrize("converted", [False, True])
def test_recorded_attention_is_that_of_the_definition(converted):
    """One layer, so that its logits follow from the embeddings alone: entropy against weights computed densely."""
    model, ids = tiny_llama(num_hidden_layers=1), random_ids(1, 40)
    attention, base = model.model.layers[0].self_attn, model.model
    with torch.no_grad():
        hidden = base.layers[0].input_layernorm(base.embed_tokens(ids))
        query, key = (
            projection(hidden).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)[0]
            for projection in (attention.q_proj, attention.k_proj)
        )
    key = key.repeat_interleave(2, 0)
    window, sinks = (16, 4) if converted else (100, 0)
    half = attention.head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)

    def turned(vector, distance):
        cos, sin = (distance * frequency).cos(), (distance * frequency).sin()
        first, second = vector[:half], vector[half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin))

    def entropy(head, i):
        seen = [j for j in range(i + 1) if i - j < window or j < sinks]
        logits = [turned(query[head, i], min(i - j, window)) @ key[head, j] for j in seen]
        logits = torch.stack(logits) * attention.head_dim**-0.5
        return torch.special.entr(logits.softmax(0)).sum(), logits.max()

    if converted:
        convert_model(model, window, sinks)
    before = model.config._attn_implementation
    plain = model(ids, use_cache=False).logits
    with recording(model, [3, 39]) as recorder:
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before
    for head in range(4):
        for column, i in enumerate((3, 39)):
            expected = entropy(head, i)
            found = recorder.entropy[0][head, column], recorder.largest[0][head, column]
            torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "sliding"), [("qwen2-mixed", [0]), ("mistral-sliding", [0, 1]), ("stablelm", [])])
@pytest.mark.parametrize("converted", [False, True])
def test_attention_is_recorded_where_layers_slide(name, sliding, converted):
    """Sliding layers spread over their own window, and recording changes nothing; short texts have no far sinks."""
    model = tiny_model(name)
    model.config.sliding_window = 8
    if converted:
        convert_model(model, 8, 2)
    for length in (40, 6):
        ids = random_ids(1, length)
        with torch.no_grad(), recording(model, [length - 1]) as recorder:
            recorded = model(ids, use_cache=False).logits
        torch.testing.assert_close(recorded, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        layers = [entropy.max() for entropy in recorder.entropy]
        assert len(layers) == 2
        assert all(layers[number] < math.log(10 if converted else 8) for number in ([0, 1] if converted else sliding))


@pytest.mark.parametrize(("name", "reason"), [("gemma2", "soft-capped"), ("gptj", "'gptj' does not go through")])
def test_attention_that_is_not_seen_is_refused(name, reason):
    model = tiny_model(name)
    with pytest.raises(LongpatchError, match=reason), recording(model, [3]):
        model(random_ids(1, 8), use_cache=False)


def test_principal_components():
    line = torch.arange(10.0)[:, None] * torch.tensor([[3.0, 4.0]])
    components = principal_components(line)
    torch.testing.assert_close(components[:, 0].abs().float(), (torch.arange(10.0) - 4.5).abs() * 5)
    assert components[:, 1].abs().max() < 1e-9
