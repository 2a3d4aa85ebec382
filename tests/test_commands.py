"""`longpatch eval` of what asks and answers, from the command line to the records, on the small model."""

import http.server
import json
import sys
import threading
from types import SimpleNamespace

import pytest

from longpatch.cli import main
from longpatch.cli.eval import COMMANDS
from longpatch.demo import load
from longpatch.evaluation.metrics import bleu, comet, sentence_bleu, similarity
from longpatch.evaluation.prompts import Answerer
from longpatch.temp_lora.learner import Learner
from tests.evaluating import STORY, WINDOW, values, write_rows

OWN_FLAGS = ("temp-lora",)  # it keeps its state, and compares with its base, in ways of its own
ANSWERING = ("passkey", "needle", "topic", "qa", "translation")


@pytest.fixture
def prompts(monkeypatch):
    """Every prompt that is put to the model, as text."""
    asked = []
    answer = Answerer.answer

    def remember(self, arm, ids):
        asked.append(self.tokenizer.decode(ids))
        return answer(self, arm, ids)

    monkeypatch.setattr(Answerer, "answer", remember)
    return asked


def flags_of(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["eval", name, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_evaluation_has_the_shared_flags_and_an_example(name, capsys):
    shown = flags_of(name, capsys)
    expected = [
        "--local-branch",
        "--rope-theta",
        "--dtype",
        "--seed",
        "--out",
        "--plot",
        "--limit",
        f"longpatch eval {name}",
    ]
    if name not in OWN_FLAGS:
        expected += ["--baseline", "--resume", "--smoothing"]
    expected += ["--chat-template"] if name in ANSWERING else []
    assert not [flag for flag in expected if flag not in shown]


def test_arms_stand_in_one_table_on_the_same_samples(ask, tmp_path, capsys):
    """The floor of a metric is known: a constant answer scores what its string has in common with the key."""
    arms = "original,truncate:64,constant:12345"
    placed = ["--lengths", "80,96", "--depths", "2", "--trials", "1", "--digits", "2"]
    arguments = ["passkey", "demo", *WINDOW, *placed, "--baseline", arms]
    records = ask(*arguments, "--plot", "keys.svg")
    by_arm = {}
    for record in records:
        if record["metric"] == "fuzzy":
            by_arm.setdefault(record["settings"]["arm"], []).append(record)
    assert list(by_arm) == ["64/4", "original", "truncate:64", "constant:12345"]
    for found in by_arm.values():
        assert [record["sample"] for record in found] == [record["sample"] for record in by_arm["64/4"]]
    for record in by_arm["constant:12345"]:
        assert record["value"] == similarity("12345", record["sample"]["key"])
    assert [line for line in capsys.readouterr().out.splitlines() if "| 64/4 | original | truncate:64 |" in line]
    drawn = (tmp_path / "keys.svg").read_text()
    assert drawn.count("<image") >= 8  # a heatmap for each arm and metric
    assert ask(*arguments, "--limit", "1", out="one.jsonl") == [
        r for r in records if r["sample"] == records[0]["sample"]
    ]


def test_passkeys_written_and_read_again(ask, tmp_path, capsys):
    placed = ["--lengths", "160", "--depths", "2", "--trials", "1", "--digits", "7", "--wording", "lm-infinite"]
    assert main(["eval", "passkey", "demo", *placed, "--write-rows", "rows.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["depth"] for row in rows] == [0.0, 1.0]
    assert all(row["input"].count(row["target"]) == 2 and "?" not in row["input"] for row in rows)
    again = ["--rows", "rows.jsonl", "--wording", "lm-infinite"]
    assert main(["eval", "passkey", "demo", *again, "--write-rows", "again.jsonl"]) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    read = ask("passkey", "demo", *WINDOW, *again)
    made = ask("passkey", "demo", *WINDOW, *placed, out="made.jsonl")
    assert [r["detail"]["answer"] for r in read[::2]] == [r["detail"]["answer"] for r in made[::2]]
    assert [r["settings"]["length"] for r in read] == [160] * 4


@pytest.fixture
def endpoint():
    """A judge that gives a 10 to every answer that holds a word, and what it was asked."""
    asked = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body["messages"][0]["content"]))
            mark = 10 if "sandwich" in body["messages"][0]["content"].partition("Answer to mark:")[2] else 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": f"I say {mark}."}}]}).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_needles_rescored_without_a_model(ask, tmp_path, endpoint, prompts, monkeypatch):
    pytest.importorskip("rouge_score", reason="needs the extra [eval]")
    (tmp_path / "more.txt").write_text(STORY * 3, encoding="utf-8")
    arms = ["--baseline", "constant:eat a sandwich"]
    placed = ["--lengths", "192", "--depths", "0,0.5", "--new-tokens", "4"]
    own = ["--needle", " He ate a sandwich.", "--question", " What did he eat?", "--target", "a sandwich"]
    address, asked = endpoint
    judged = ["--judge", address, "--judge-key", "x"]
    records = ask("needle", "demo", tmp_path, *WINDOW, *placed, *arms, *own, *judged)
    assert values(records, "judge") == [0, 0, 1, 1]
    assert all(
        prompt.count("He ate a sandwich. ") == prompt.count("What did he eat?\nAnswer:") == 1 for prompt in prompts
    )
    assert values(records, "match") == [0, 0, 1, 1]
    assert values(records, "rougeL")[2:] == [pytest.approx(0.8)] * 2

    def no_model(*args, **kwargs):
        raise AssertionError("a model was opened")

    monkeypatch.setattr("longpatch.cli.flags.load_model", no_model)
    judged += ["--rescore", "out.jsonl", "--metrics", "match", "--target", "eat"]
    again = ask("needle", "demo", *judged, out="again.jsonl")
    assert values(again, "match") == [0, 0, 1, 1]
    assert values(again, "judge") == [0, 0, 1, 1]
    assert not values(again, "rougeL")
    assert [r["detail"] for r in again[::3]] == [r["detail"] | {"target": "eat"} for r in records[::4]]
    own = ask("needle", "demo", "--rescore", "out.jsonl", out="own.jsonl")  # by what each was asked
    assert [(r["metric"], r["value"], r["detail"]) for r in own] == [
        (r["metric"], r["value"], r["detail"]) for r in records if r["metric"] != "judge"
    ]
    assert len(ask("needle", "demo", *judged, "--limit", "1", out="one.jsonl")) == 3
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}
    assert {key for _, key, _ in asked} == {"Bearer x"}


def test_topics_and_lines_from_longevals_files(ask, tmp_path):
    rows = [
        {"topics": ["bees", "tides"], "prompt": "USER: I would like to discuss the topic of bees. What was it?"},
        {"expected_number": 31, "prompt": "line a: REGISTER_CONTENT is <31>\nWhich?"},
        {"expected_number": 3, "prompt": "line a: REGISTER_CONTENT is <3>\nWhich?"},  # 31 holds a 3, and is none
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["--new-tokens", "2", "--baseline", "constant:The bees. 31"]
    read = ask("topic", "demo", *WINDOW, "--rows", "rows.jsonl", *arguments)
    assert [(r["settings"]["task"], r["settings"]["length"]) for r in read[3:]] == [
        ("topic", 2),
        ("line", 1),
        ("line", 1),
    ]
    assert values(read, "correct")[3:] == [1, 1, 0]
    made = ask("topic", "demo", *WINDOW, "--topics", "1", "--lines", "2", "--trials", "1", *arguments, out="made.jsonl")
    assert [(r["settings"]["task"], r["settings"]["length"]) for r in made[:2]] == [("topic", 1), ("line", 2)]


def test_questions_get_the_best_of_their_references(ask, tmp_path, prompts):
    rows = [{"context": STORY * 4, "question": "What was seen?", "answers": ["a far light", "the light"], "id": "q"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["--new-tokens", "2", "--context-tokens", "20", "--baseline", "constant:A light</Answer> there"]
    found = ask("qa", "demo", "rows.jsonl", *WINDOW, *arguments)
    assert [r["value"] for r in found if r["settings"]["arm"].startswith("constant")] == [1, 1]
    assert found[-1]["sample"]["row"] == "q"
    _, tokenizer = load()
    ids = tokenizer.encode(STORY * 4, add_special_tokens=False)
    kept = " ".join(tokenizer.decode(part) for part in (ids[:10], ids[-10:]))
    assert all(f"Article: {kept} Question: What was seen?" in prompt for prompt in prompts)
    assert all(prompt.endswith("<Answer>") for prompt in prompts)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}USER: {{ m.content }} {% endfor %}BOT:")
    ask("qa", "demo", "rows.jsonl", "--new-tokens", "1", "--chat-template", "chat.jinja", out="chat.jsonl")
    assert prompts[-1].startswith("USER: ")
    assert prompts[-1].endswith("BOT: <Answer>")


def test_continuations_score_what_the_libraries_say(ask):
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    arguments = ["--positions", "40,80", "--new-tokens", "16", "--baseline", "original"]
    records = ask("generation", "demo", "story.txt", *WINDOW, *arguments)
    answered = [r for r in records if r["metric"] == "bleu_sentence"]
    assert len(answered) == 4
    for record, rouge_1, rouge_l in zip(answered, values(records, "rouge1"), values(records, "rougeL"), strict=True):
        answer, reference = record["detail"]["answer"], record["detail"]["reference"]
        assert record["value"] == sacrebleu.sentence_bleu(answer, [reference]).score
        expected = scorer.score(reference, answer)
        assert (rouge_1, rouge_l) == (expected["rouge1"].fmeasure, expected["rougeL"].fmeasure)
    assert len(values(records, "bleu")) == 4
    answer, reference = answered[0]["detail"]["answer"], answered[0]["detail"]["reference"]
    assert values(records, "bleu")[0] == sacrebleu.corpus_bleu([answer], [[reference]]).score


def test_bleu_of_languages_without_blanks():
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    answers, references = ["我喜欢这本书。", "他回家了"], ["我喜欢那本书。", "他已经回家了"]
    assert bleu(answers, references, "zh") == sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score > 0
    assert sentence_bleu(answers[0], references[0], "zh") > sentence_bleu(answers[0], references[0]) == 0
    assert sentence_bleu("two words", "two words") == sacrebleu.sentence_bleu("two words", ["two words"]).score > 99


SEGMENTS = [{"zh": f"看，第{number}条船", "en": f"Look, the ship number {number} goes home"} for number in range(4)]


def test_translations_by_the_base_and_by_an_adapter(ask, tmp_path, monkeypatch):
    """They agree until something was learned; then, on a document that repeats itself, the adapter knows better."""
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    context = {"k3": [{"zh": "前面", "en": "before"}]}
    (tmp_path / "guofeng.json").write_text(json.dumps([{"contexts": context, "inference": SEGMENTS}]))
    learn = ["--temp-lora", "--rank", "8", "--learning-rate", "5e-3", "--dropout", "0", "--epochs", "4"]
    learned, learn_pair = [], Learner.learn

    def remember(self, context, ids):
        learned.append(context[0])
        return learn_pair(self, context, ids)

    monkeypatch.setattr(Learner, "learn", remember)
    arguments = ["--pairs", "1", "--new-tokens", "4", "--baseline", "truncate:16,constant:home"]
    records = ask("translation", "demo", "guofeng.json", *WINDOW, *learn, *arguments)
    nll = {}
    for record in records:
        if record["metric"] == "nll":
            nll.setdefault((record["settings"]["arm"], record["settings"]["translator"]), []).append(record["value"])
    base, adapted = nll["64/4", "base"], nll["64/4", "temp-lora"]
    assert list(nll) == [(arm, way) for arm in ("64/4", "truncate:16") for way in ("base", "temp-lora")]
    cut = [abs(a - b) for a, b in zip(base, nll["truncate:16", "base"], strict=True)]
    assert min(cut) > 0.01
    assert all(len(shown) <= 16 for shown in learned[len(learned) // 2 :])
    assert adapted[0] == base[0]
    assert adapted[3] < base[3] - 0.2
    shown = {r["settings"]["translator"] for r in records if r["metric"] == "bleu"}
    assert shown == {"base", "temp-lora"}
    assert records[0]["settings"]["learn"]["rank"] == 8


def test_comet_is_asked_for_every_segment(monkeypatch):
    asked = []

    class Model:
        def predict(self, rows, gpus):
            asked.extend(rows)
            return SimpleNamespace(scores=[0.25 * number for number in range(len(rows))])

    stand_in = SimpleNamespace(download_model=lambda name: f"{name}.ckpt", load_from_checkpoint=lambda path: Model())
    monkeypatch.setitem(sys.modules, "comet", stand_in)
    monkeypatch.setattr("longpatch.evaluation.metrics.find_spec", lambda name: stand_in)
    assert comet(["a", "b"], ["x", "y"], ["r", "s"], "some/model") == [0.0, 0.25]
    assert asked == [{"src": "a", "mt": "x", "ref": "r"}, {"src": "b", "mt": "y", "ref": "s"}]


def test_without_comet_one_line_says_what_is_missing(ask, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    monkeypatch.setattr("longpatch.evaluation.metrics.find_spec", lambda name: None if name == "comet" else name)
    write_rows(tmp_path / "rows.jsonl", [{"segments": [{"source": "a", "target": "b"}]}])
    assert main(["eval", "translation", "demo", "rows.jsonl", "--new-tokens", "1", "--comet", "m"]) == 2
    assert "COMET needs the package comet. Supported: pip install unbabel-comet" in capsys.readouterr().err
