"""`longpatch eval` of what reads: perplexity, memory, the diagnosis; runs that are killed; reports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.functional import cross_entropy

from longpatch import interpolate_rope
from longpatch.cli import main
from longpatch.demo import load
from longpatch.results import read_records
from tests.evaluating import STORY, WINDOW, values
from tests.processes import environment


def test_memory_of_a_converted_model_is_flat(ask):
    arguments = ["--lengths", "256,768", "--baseline", "original", "--new-tokens", "2", "--chunk", "128"]
    records = ask("memory", "demo", *WINDOW, "--text", "story.txt", *arguments)
    held = [round(value * 2**20) for value in values(records, "cache")]
    per_token = 2 * 5 * 2 * 64 * 4  # keys and values, layers, key heads, head size, bytes
    assert held[:2] == [held[0]] * 2
    assert held[0] <= (2 * 4 + 64 + 64) * per_token
    assert held[2:] == [256 * per_token, 768 * per_token]
    assert min(values(records, "peak_memory") + values(records, "decode") + values(records, "prefill")) > 0


def test_the_diagnosis_is_drawn(ask, tmp_path):
    arguments = ["--length", "128", "--baseline", "original", "--by-layer", "--plot", "diagnosis.png"]
    records = ask("attention", "demo", "story.txt", *WINDOW, *arguments)
    entropy = {
        (r["settings"]["arm"], r["settings"]["position"]): r["value"]
        for r in records
        if r["metric"] == "entropy" and r["settings"]["layer"] == 0
    }
    assert entropy["original", 0] == 0
    assert entropy["original", 31] == pytest.approx(entropy["64/4", 31], rel=1e-4)
    assert entropy["original", 127] > entropy["64/4", 127]
    assert {r["metric"] for r in records} == {"entropy", "largest_logit", "component_1", "component_2"}
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def demo():
    return load()


@torch.no_grad()
def plain_loop(model, ids, length, stride):
    """The loop of transformers' own guide to perplexity: overlapping windows, each token counted once."""
    nll, end = [], 0
    for begin in range(0, len(ids), stride):
        stop = min(begin + length + 1, len(ids))
        logits = model(ids[None, begin:stop]).logits[0, :-1]
        losses = cross_entropy(logits, ids[begin + 1 : stop], reduction="none")
        nll.append(losses[len(losses) - (stop - max(end, begin + 1)) :])
        end = stop
        if stop == len(ids):
            break
    return torch.cat(nll).double()


@pytest.mark.parametrize(
    ("arguments", "length", "stride"),
    [
        (["--no-convert", "--chunk", "200"], 1000, 1000),
        (["--no-convert", "--sliding-window", "24", "--seq-len", "64"], 64, 24),
        (["--chunk", "200", "--baseline", "truncate:64"], 64, 32),
    ],
)
def test_perplexity_is_that_of_a_plain_loop(ask, demo, arguments, length, stride):
    model, tokenizer = demo
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(STORY * 12, add_special_tokens=False)])[:200]
    expected = plain_loop(model, ids, length, stride)
    assert len(expected) == 199
    records = ask("perplexity", "demo", "story.txt", "--length", "200", *arguments)
    found = values(records, "nll_document")[-1]
    assert found == pytest.approx(expected.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--rope-theta", "80000"], {"theta": 80_000.0}),
        (["--rope-method", "linear", "--rope-factor", "4"], {"method": "linear", "factor": 4.0}),
    ],
)
def test_flags_stretch_positions(ask, flags, settings):
    model, tokenizer = load()
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(STORY * 12, add_special_tokens=False)])[:200]
    before = plain_loop(model, ids, 1000, 1000).mean().item()
    expected = plain_loop(interpolate_rope(model, **settings), ids, 1000, 1000).mean().item()
    (found,) = [
        record
        for record in ask("perplexity", "demo", "story.txt", "--no-convert", "--length", "200", *flags)
        if record["metric"] == "nll_document"
    ]
    assert found["value"] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - before) > 0.01
    assert {f"rope_{name}": value for name, value in settings.items()}.items() <= found["settings"].items()


def test_flags_that_would_be_ignored_are_refused(ask, capsys):
    asked = ["eval", "perplexity", "demo", "story.txt"]
    assert main([*asked, "--sliding-window", "65", "--seq-len", "64"]) == 2
    assert "--sliding-window 65 leaves tokens out between windows of 64" in capsys.readouterr().err
    assert main([*asked, "--sliding-window", "64", "--bucket", "10"]) == 2
    assert "--bucket with --sliding-window" in capsys.readouterr().err
    assert main([*asked, "--seq-len", "64", "--score", "all"]) == 2
    assert "--seq-len, --score without --sliding-window" in capsys.readouterr().err
    assert main([*asked, "--rope-factor", "4"]) == 2
    assert "factor=4.0 is given without a method" in capsys.readouterr().err


def test_mean_variance_and_count_of_every_position(ask, demo, tmp_path, capsys):
    model, tokenizer = demo
    (tmp_path / "texts").mkdir()
    texts = [STORY, STORY[20:] * 2, STORY[7:]]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
        losses.append(plain_loop(model, ids, 1000, 1000))
    records = ask("perplexity", "demo", "texts", "--no-convert", "--bucket", "1", "--plot", "a.png", "--smoothing", "5")
    assert main(["report", "out.jsonl", "--metric", "nll_variance", "--counts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines if line.count("|") == 4}
    for position in (0, 9, 30):
        here = torch.stack([nll[position] for nll in losses if len(nll) > position])
        found = [r for r in records if r["metric"] == "nll" and r["settings"]["start"] == position]
        assert [r["value"] for r in found] == pytest.approx(here.tolist(), rel=1e-4)
        shown, count = rows[str(position)].split(" (n ")
        assert float(shown) == pytest.approx(here.var(correction=0).item(), rel=2e-3)
        assert count == f"{len(here)})"
    chosen = ask("perplexity", "demo", "texts", "--no-convert", "--start", "1", "--limit", "1", out="chosen.jsonl")
    assert {r["sample"]["document"] for r in chosen} == {"1.txt"}


def test_documents_joined_are_one_text(ask, tmp_path, demo):
    model, tokenizer = demo
    (tmp_path / "texts").mkdir()
    for name, text in (("a.txt", STORY), ("b.txt", STORY[::-1])):
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (STORY, STORY[::-1])]
    ids = torch.tensor([tokenizer.bos_token_id, *parts[0], *parts[1]])
    records = ask("perplexity", "demo", "texts", "--no-convert", "--join", "--chunk", "1000", "--bucket", "32")
    assert values(records, "nll_document") == [
        pytest.approx(plain_loop(model, ids, 1000, 1000).mean().item(), rel=1e-6)
    ]
    assert {record["sample"]["document"] for record in records} == {"a.txt and 1 more"}
    cache = [r for r in records if r["metric"] == "cache"]
    assert [round(r["value"] * 2**20) for r in cache] == [len(ids) * 5120 for r in cache]


def test_killed_and_resumed_is_the_same_file(ask, tmp_path):
    """A process killed by the system after its state was kept, not one that stops of its own accord."""
    arguments = [
        "eval", "perplexity", "demo", "story.txt", *WINDOW, "--repeat", "8", "--chunk", "64", "--bucket", "1000",
        "--save-every", "300",
    ]  # fmt: skip
    command = [sys.executable, "-m", "longpatch.cli", *arguments, "--out", "out.jsonl"]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    state = tmp_path / "out.jsonl.state0" / "state.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (tmp_path / "out.jsonl").exists()
    saved = json.loads(state.read_text())
    shutil.copytree(state.parent, tmp_path / "new.jsonl.state0")  # left behind by a run whose journal is gone
    spoilt = saved | {"spans": [[n, mean + 1, *rest] for n, mean, *rest in saved["spans"]]}
    (tmp_path / "new.jsonl.state0" / "state.json").write_text(json.dumps(spoilt))
    assert main([*arguments, "--out", "out.jsonl", "--resume", "--bucket", "500"]) == 2  # another run
    assert main([*arguments, "--out", "out.jsonl", "--resume"]) == 0
    assert main([*arguments, "--out", "whole.jsonl"]) == 0
    whole = read_records(tmp_path / "whole.jsonl")
    assert 0 < saved["read"] < whole[-2]["n"]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert main([*arguments, "--out", "new.jsonl"]) == 0
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["new.jsonl", "out.jsonl", "whole.jsonl"]


def test_reports_compare_runs(ask, tmp_path, capsys):
    for window in (16, 64):
        ask("perplexity", "demo", "story.txt", tmp_path / "story.txt", "--local-branch", window, "--length", "150",
            "--global-branch", "2", out=f"{window}.jsonl")  # fmt: skip
    capsys.readouterr()
    assert main(["report", "16.jsonl", "64.jsonl", "--metric", "all tokens", "--plot", "both.svg"]) == 0
    shown = capsys.readouterr().out
    assert "| 16/2 | 64/2 |" in shown
    assert "ratio to 16/2, same samples" in shown
    assert (tmp_path / "both.svg").read_text().count("16/2")
    assert main(["report", "16.jsonl", "--out", "table.md", "--no-intervals"]) == 0
    assert "[" not in (tmp_path / "table.md").read_text()
    assert main(["report", "nowhere.jsonl"]) == 2
