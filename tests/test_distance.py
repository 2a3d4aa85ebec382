"""What a model cannot see costs nothing to lose; what it uses costs something."""

import json

import torch

from longpatch import convert_model
from longpatch.cli import main
from longpatch.cli.eval.distance import farthest_used
from longpatch.data.documents import Encoder
from longpatch.data.sources import Source
from longpatch.demo import load
from longpatch.evaluation.distance import answers, distance_losses, doubling, windows
from longpatch.report.summary import Cell, Row
from longpatch.results import read_records
from tests.tiny import random_ids, tiny_llama

SCORED = 4


def costs(model):
    read = distance_losses(model, random_ids(1, 100)[0], [4, 16, 32], SCORED, None, seed=0)
    losses = {(way, distance): loss for way, distance, loss in read}
    full = losses.pop(("full", 0))
    return {key: abs(loss - full) for key, loss in losses.items()}


def test_a_window_of_16_uses_nothing_beyond_it():
    model = convert_model(tiny_llama(num_hidden_layers=1), 16, 0)
    found = costs(model)
    for way in ("hidden", "shuffled"):
        assert found[way, 4] > 1e-3
        assert found[way, 16] < 1e-5
        assert found[way, 32] < 1e-5


def test_only_the_logits_that_count_are_made():
    model, shapes = tiny_llama(num_hidden_layers=1), set()
    model.lm_head.register_forward_hook(lambda head, inputs, logits: shapes.add(logits.shape[1]))
    costs(model)
    assert shapes == {SCORED + 1}


def test_full_attention_uses_all():
    assert min(costs(tiny_llama(num_hidden_layers=1)).values()) > 1e-3


def test_windows_are_spread_and_whole():
    ids = torch.arange(1000)
    assert [window[0].item() for window in windows(ids, 100, 3)] == [0, 300, 600]
    assert len(windows(ids, 300)) == 3
    assert doubling(100, 4) == [16, 32, 64]


def test_what_is_used_is_what_has_a_cost_beyond_doubt():
    def rows(way, costs):
        cells = {distance: {"a": Cell(0.0, low, 1.0, 3, 3)} for distance, low in costs.items()}
        return [Row("", "cost", "nat", {"way": way, "distance": d}, cell, {}) for d, cell in cells.items()]

    found = [*rows("hidden", {8: 0.5, 16: 0.1, 32: -0.1}), *rows("shuffled", {8: None})]
    assert farthest_used(found, "hidden", "a") == 16
    assert farthest_used(found, "shuffled", "a") == 0
    assert farthest_used(found, "hidden", "b") == 0


def test_the_command(tmp_path, capsys):
    text, out, plot = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.png"
    text.write_text("It was a dark and stormy night, and the rain fell. " * 100)
    arguments = ["eval", "distance", "demo", str(text), "--no-convert", "--length", "200", "--windows", "2"]
    assert main([*arguments, "--out", str(out), "--plot", str(plot), "--baseline", "32/2"]) == 0
    assert "original, hidden: context beyond" in capsys.readouterr().out
    assert plot.stat().st_size > 1000
    records = read_records(out)
    assert len(records) == 2 * 2 * 2 * 4 * 2  # arms, windows, ways, distances, metrics
    costs = {}
    for record in records[::2]:
        place = record["settings"]["arm"], record["settings"]["way"], record["settings"]["distance"]
        costs.setdefault(place, []).append(record["value"])
    assert min(costs["original", "hidden", 16]) > 0.01
    model, tokenizer = load()
    first = torch.tensor(tokenizer.encode(text.read_text(), add_special_tokens=False))[:200]
    read = list(distance_losses(model, first, [16, 32, 64, 128], 64, tokenizer.bos_token_id, 0))
    assert records[0]["value"] == read[1][2] - read[0][2]
    assert main([*arguments, "--distances", "136"]) == 2
    assert "less than length - scored = 136" in capsys.readouterr().err


def test_of_rows_the_last_answer_counts(tmp_path, capsys):
    _, tokenizer = load()
    turns = [("user", "It was dark. " * 30 + "Was it?"), ("assistant", "Yes."), ("user", "How?"), ("assistant", "So.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    ((window, scored),) = answers([Encoder(tokenizer)((0, Source("", row)))], tokenizer.bos_token_id)
    assert tokenizer.decode(window[-scored:]) == "So.<s>"
    assert tokenizer.decode(window).startswith("It was dark.")
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3 + json.dumps({"text": "Not a conversation."}))
    arguments = ["eval", "distance", "demo", str(path), "--no-convert", "--length", "200", "--distances", "16", "64"]
    assert main(arguments) == 0
    assert "samples 3" in capsys.readouterr().out
    assert main([*arguments[:6], "512", "--distances", "256"]) == 2
    assert "no text has 512 tokens" in capsys.readouterr().err
