"""Planted questions lie where they say; an endpoint is asked once for each row, again where it fails."""

import http.server
import json
import threading
import time
from itertools import islice

import pytest

from longpatch import LongpatchError
from longpatch.cli import main
from longpatch.data.documents import Encoder
from longpatch.data.sources import Source
from longpatch.demo import load
from longpatch.endpoint import Endpoint
from longpatch.synthesis.plant import Planting, planted_rows
from longpatch.synthesis.puzzles import KINDS, NUMBERS
from longpatch.synthesis.questions import GAP, Asking, make_jobs, read_pairs
from longpatch.synthesis.requests import cost, send

TEXT = " ".join(f"Mr. {name} went to town number {i}. He saw nobody there." for i in range(900) for name in ("A", "B"))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load()[1])


def rows(encoder, count, **settings):
    return list(islice(planted_rows([TEXT], encoder, Planting(**{"length": 512} | settings)), count))


def size(encoder, messages):
    return len(encoder((0, Source("", {"messages": messages}))).ids)


@pytest.mark.parametrize("wanted", [50, 200, 400])
def test_facts_lie_at_the_distance_that_is_asked_for(encoder, wanted):
    for row in rows(encoder, 5, kinds=("key-value",), distances=(wanted,)):
        question, answer = (message["content"] for message in row["messages"])
        text, _, _ = question.rpartition("\n\n")
        assert text.count(answer) == 1
        behind = len(encoder.tokens.inner(text.partition(answer)[2]))
        assert row["distances"] == pytest.approx([behind], abs=2)
        assert abs(behind - wanted) < 20  # half a sentence
        assert 440 < size(encoder, row["messages"]) <= 512


def test_answers_follow_from_what_is_planted(encoder):
    for row in rows(encoder, 20, questions=3):
        text = row["messages"][0]["content"].rpartition("\n\n")[0]
        assert len(row["kinds"]) == len(row["distances"]) == 3
        for kind, answer in zip(row["kinds"], (m["content"] for m in row["messages"][1::2]), strict=True):
            if kind == "key-value":
                assert text.count(answer) == 1
            elif kind == "multi-hop":
                thing, town = answer.removeprefix("The ").removesuffix(".").split(" is in ")
                first = text.partition(f"The {thing} was given to ")[2].partition(".")[0]
                second = text.partition(f"{first} gave everything to ")[2].partition(".")[0]
                assert f"{second} lives in {town}." in text
            else:
                count = NUMBERS.index(answer.split()[-2]) + 2
                planted = {"bell": "a bell rang", "dog": "a dog barked", "door": "a door slammed"}
                planted |= {"cock": "A cock crowed", "gun": "A gun was fired", "lights": "the lights went out"}
                line = next(line for word, line in planted.items() if word in answer)
                assert text.count(line) == count


def test_rows_are_the_same_for_the_same_seed(encoder):
    assert rows(encoder, 3, seed=1) == rows(encoder, 3, seed=1) != rows(encoder, 3, seed=2)


def test_what_cannot_be_planted_is_refused(encoder):
    for settings, match in (
        ({"kinds": ("riddle",)}, "kind 'riddle' is unknown.*key-value, multi-hop, counting"),
        ({"distances": (600,)}, "distance 600 is not within the length"),
        ({"questions": 30, "length": 100}, "leave -?[0-9]+ of 100 tokens"),
        ({"length": 200_000}, "no text has [0-9]+ tokens"),
        ({"kinds": ("counting",), "questions": 10}, "too many of these kinds"),
    ):
        with pytest.raises(LongpatchError, match=match):
            rows(encoder, 1, **settings)
    assert set(KINDS) == {"key-value", "multi-hop", "counting"}


def test_the_offline_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "rows.jsonl"
    command = ["synthesize", "offline", "demo", str(tmp_path / "a.txt"), str(out), "--length", "256", "--rows", "4"]
    assert main(command) == 0
    assert len(out.read_text().splitlines()) == 4
    (tmp_path / "b.jsonl").write_text('{"input": "x", "output": "y"}\n')
    command[3:5] = [str(tmp_path / "b.jsonl"), str(tmp_path / "none.jsonl")]
    assert main(command) == 2
    assert "b.jsonl:1 has no text" in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `server.replies(number of the request, prompt)` says: text, or a status."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(
                (time.monotonic(), prompt, self.headers["Authorization"], body["model"], body.get("max_tokens"))
            )
        reply = self.server.replies(number, prompt)
        content = b"{}"
        if isinstance(reply, str):
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200 if isinstance(reply, str) else reply)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


GOOD = 'Here: [{"question": "Who?", "answer": "She."}, {"question": "Where?", "answer": "There."}]'


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.lock, server.replies = [], threading.Lock(), lambda number, prompt: GOOD
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


ASKING = Asking(length=500, segment=50, segments=4, questions=2)


def jobs(**settings):
    texts = {name: f"{name} " * 1000 for name in ("one", "two", "six")}
    return list(make_jobs(texts, ASKING if not settings else Asking(**settings)))


def test_each_kind_shows_excerpts_and_keeps_the_whole_text():
    made = jobs()
    assert len(made) == 3 * (2 + 2 + 1)  # of each text: its two stretches in two ways, and its life
    by_kind = {job.kind: job for job in made}
    assert by_kind["detail"].prompt.count("[Part") == 1
    assert by_kind["life"].prompt.count("[Part") == 4
    assert by_kind["life"].questions == 1
    assert "Text 1" in by_kind["details"].text
    assert "Text 2" in by_kind["details"].text
    row = by_kind["detail"].row(GOOD)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    assert row["messages"][0]["content"] == by_kind["detail"].text + "\n\nWho?"
    assert row["messages"][2]["content"] == "Where?"
    assert len(by_kind["detail"].prompt) < 2 * 50 * 4 + 600
    assert [job.name for job in made] == [job.name for job in jobs()]
    with pytest.raises(LongpatchError, match="1 texts, where 'details' brings 2 together"):
        list(make_jobs({"a": "short"}, ASKING))


def test_a_life_is_asked_for_once_a_book_from_its_beginning_to_its_end():
    book = "".join(f"w{number:05} " for number in range(2000))  # seven rows long
    (job,) = make_jobs({"book": book}, Asking(("life",), length=500, segment=20, segments=4))
    parts = job.text.split(GAP)
    assert len(parts) == 4
    assert book.startswith(parts[0])
    assert book.endswith(parts[-1])
    assert all(part in book for part in parts)
    assert sum(map(len, parts)) <= 500 * 4
    excerpts = [excerpt.partition("]\n")[2].strip("\n") for excerpt in job.prompt.split("[Part ")[1:]]
    assert [next(i for i, part in enumerate(parts) if excerpt in part) for excerpt in excerpts] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [2, 3])
def test_details_are_of_different_texts_where_there_are_enough(count):
    texts = {name: f"{name} " * 2000 for name in ("one", "two", "six")}
    made = list(make_jobs(texts, Asking(("details",), length=500, segment=50, texts=count)))
    assert len(made) == 3 * 4
    assert all(sum(name in job.text for name in texts) == count for job in made)
    assert all(job.name.split(":")[1] in job.text.split("\n\n")[1] for job in made)
    (alone, *_) = make_jobs({"one": texts["one"]}, Asking(("details",), length=500, segment=50, texts=2))
    assert alone.text.count("Text ") == 2


@pytest.mark.parametrize(
    "reply", [f"From [Part 1] and [Part 2]: {GOOD}", f"{GOOD} See [1].", GOOD.replace("She", "She [1]"), f"[1] {GOOD}]"]
)
def test_replies_with_other_brackets(reply):
    assert len(read_pairs(reply)) == 2


@pytest.mark.parametrize(
    "reply", ["", "[" * 100_000, "no json", "[]", "[1]", '[{"question": "Who?"}]', '[{"question": "", "answer": "x"}]']
)
def test_replies_that_are_none(reply):
    with pytest.raises(LongpatchError, match="holds no questions and answers"):
        read_pairs(reply)


def test_failures_are_tried_again(server, tmp_path):
    server.replies = lambda number, prompt: {0: 429, 1: 503, 2: 500, 3: "no json"}.get(number, GOOD)
    out, made = tmp_path / "out.jsonl", jobs()
    failures = list(send(made, Endpoint(server.url, "m", "secret", retries=4), out, parallel=3))
    assert failures == [None] * len(made)
    assert sorted(json.loads(line)["job"] for line in out.read_text().splitlines()) == sorted(job.name for job in made)
    assert len(server.asked) == len(made) + 4
    assert {asked[2:4] for asked in server.asked} == {("Bearer secret", "m")}


@pytest.mark.parametrize("bad", ["sorry", "", 400, 422])
def test_one_bad_text_costs_one_row(server, tmp_path, bad):
    made = jobs(kinds=("detail",), length=500, segment=50)
    server.replies = lambda number, prompt: bad if prompt == made[2].prompt else GOOD
    failures = list(send(made, Endpoint(server.url, "m"), tmp_path / "new" / "out.jsonl"))
    (failure,) = filter(None, failures)
    assert made[2].name in failure
    assert len(failures) == len(made)
    assert len((tmp_path / "new" / "out.jsonl").read_text().splitlines()) == len(made) - 1


def test_what_was_answered_is_on_disk_when_the_endpoint_fails(server, tmp_path):
    """Also where the first request is the one that fails, and last."""
    made, out = jobs(), tmp_path / "out.jsonl"
    answered = threading.Semaphore(0)

    def reply(number, prompt):
        if prompt == made[0].prompt:
            for _ in range(3):
                answered.acquire(timeout=10)
            return 401
        answered.release()
        return GOOD

    server.replies = reply
    with pytest.raises(LongpatchError, match="AuthenticationError"):
        list(send(made, Endpoint(server.url, "m", retries=0), out, parallel=2))
    assert len(out.read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    "content", ['{"a": 1}', "5", '{"messages": []}', '{"messages": [{"role": "user", "content": "x"}]}', "{}\n", "text"]
)
def test_a_file_that_is_something_else_stays_as_it_is(server, tmp_path, capsys, content):
    (tmp_path / "a.txt").write_text("one " * 1000)
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    command = ["synthesize", "endpoint", str(tmp_path / "a.txt"), str(out), "--endpoint", server.url, "--name", "m"]
    assert main([*command, "--kinds", "detail", "--yes", "--resume"]) == 2
    assert "from here" in capsys.readouterr().err
    assert (out.read_text(), server.asked) == (content, [])


def test_nothing_is_cut_off_before_something_is_sent(server, tmp_path):
    (tmp_path / "a.txt").write_text("one " * 1000)
    out = tmp_path / "out.jsonl"
    out.write_text('{"messages": [{"role": "us')
    command = ["synthesize", "endpoint", str(tmp_path / "a.txt"), str(out), "--endpoint", server.url, "--name", "m"]
    command += ["--kinds", "detail", "--resume"]
    assert main(command) == 0
    assert out.read_text() == '{"messages": [{"role": "us'
    assert main([*command, "--yes", "--max-tokens", "77"]) == 0
    assert [json.loads(line)["kind"] for line in out.read_text().splitlines()] == ["detail"]
    assert {asked[4] for asked in server.asked} == {77}


def test_requests_keep_their_distance(server, tmp_path):
    endpoint = Endpoint(server.url, "m", per_minute=1200)  # every 50 ms
    list(send(jobs()[:8], endpoint, tmp_path / "out.jsonl", parallel=8))
    times = sorted(asked[0] for asked in server.asked)
    assert times[-1] - times[0] > 0.9 * 7 * 0.05


def test_a_run_that_was_cut_off_goes_on(server, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 1000)
    out = tmp_path / "out.jsonl"
    texts = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    command = ["synthesize", "endpoint", *texts, str(out), "--endpoint", server.url, "--name", "m"]
    command += ["--length", "500", "--segment", "50", "--kinds", "detail,life", "--retries", "0", "--parallel", "1"]
    assert main([*command, "--prices", "1", "10"]) == 0
    shown = capsys.readouterr().out
    assert "6 requests" in shown
    assert "nothing was sent" in shown
    assert not server.asked
    assert not out.exists()
    server.replies = lambda number, prompt: GOOD if number < 3 else 500
    assert main([*command, "--yes"]) == 2
    assert f"endpoint: {server.url}" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 3
    out.write_text(out.read_text() + '{"messages": [{"ro')
    assert main([*command, "--yes"]) == 2
    assert "out.jsonl exists" in capsys.readouterr().err
    server.replies = lambda number, prompt: GOOD
    before = len(server.asked)
    assert main([*command, "--yes", "--resume"]) == 0
    assert len(server.asked) - before == 3
    names = [json.loads(line)["job"] for line in out.read_text().splitlines()]
    assert len(names) == len(set(names)) == 6


def test_the_cost_is_counted_from_what_is_sent():
    made = jobs(kinds=("detail",), length=500, segment=50, questions=3)
    estimate = cost(made)
    assert estimate.requests == len(made)
    assert estimate.input_tokens == sum(len(job.prompt) for job in made) // 4
    assert estimate.output_tokens == len(made) * 3 * 80
    assert estimate.price(1, 2) == pytest.approx((estimate.input_tokens + 2 * estimate.output_tokens) / 1e6)


def test_no_endpoint_is_one_line(tmp_path):
    with pytest.raises(LongpatchError, match=r"endpoint: http://127.0.0.1:9/v1: APIConnectionError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0, timeout_s=2)("Hi")
