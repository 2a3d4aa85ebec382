"""What a model cannot see costs nothing to lose; what it uses costs something."""

import json

import pytest
import torch

from longpatch import convert_model
from longpatch.cli import main
from longpatch.data.documents import Encoder
from longpatch.data.sources import Source
from longpatch.demo import load
from longpatch.evaluation.distance import answers, distance_losses, doubling, effects, farthest_used, windows
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


def test_full_attention_uses_all():
    assert min(costs(tiny_llama(num_hidden_layers=1)).values()) > 1e-3


def test_windows_are_spread_and_whole():
    ids = torch.arange(1000)
    assert [window[0].item() for window in windows(ids, 100, 3)] == [0, 300, 600]
    assert len(windows(ids, 300)) == 3
    assert doubling(100, 4) == [16, 32, 64]


def test_costs_are_means_over_windows():
    losses = [{("full", 0): 1.0, ("hidden", 8): 2.0 + i, ("hidden", 16): 1.0} for i in range(3)]
    far, near = sorted(effects(losses), key=lambda effect: effect.cost)
    assert (near.distance, near.cost, near.windows) == (8, 2.0, 3)
    assert near.error == pytest.approx(3**-0.5)
    assert far.cost == 0
    assert farthest_used([far, near], "hidden") == 8


def test_the_command(tmp_path, capsys):
    text, out, plot = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.png"
    text.write_text("It was a dark and stormy night, and the rain fell. " * 100)
    arguments = ["eval", "distance", "demo", str(text), "--no-convert", "--length", "200", "--limit", "2"]
    assert main([*arguments, "--out", str(out), "--plot", str(plot)]) == 0
    assert "shuffled        64" in capsys.readouterr().out
    assert plot.stat().st_size > 1000
    assert len(out.read_text().splitlines()) == 2 * 4 * 3
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
    assert "3 windows" in capsys.readouterr().out
    assert main([*arguments[:6], "512", "--distances", "256"]) == 2
    assert "no text has 512 tokens" in capsys.readouterr().err
