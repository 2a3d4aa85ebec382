"""What else a model may be, what ends a run, and the command line."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.straight import generator_run, straight_loop
from longpatch import LongpatchError, TempLoraGenerator, convert_model, temp_lora
from longpatch.cli import main
from longpatch.packing import unpacked
from longpatch.results import read_records
from longpatch.temp_lora import Learner, run
from tests.families import tiny_model
from tests.test_temp_lora import SETTINGS, Stop, assert_same, snapshot
from tests.test_temp_lora_generator import GREEDY, LEARN, StopAt, Streamer, model_with_end, padded
from tests.test_temp_lora_resume import KillAt, Killed
from tests.tiny import random_ids, tiny_llama

FAMILIES = ["cohere", "falcon", "gemma3_text", "gpt_neox", "gptj", "mixtral", "mpt", "phi3"]


def at_rate_zero_and_learning(model, expected, rows=2, **extra):
    """Plain generate's tokens where nothing is learned; a chunk is likelier after it was learned."""
    ids, mask = padded(rows)
    settings = {"chunk_tokens": 8, "context_tokens": 64} | LEARN | extra
    still = TempLoraGenerator(model, **settings | {"learning_rate": 0.0})
    assert torch.equal(still.generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 20}), expected(ids, mask))
    learning = TempLoraGenerator(model, **settings | {"learning_rate": 1e-3})
    learning.generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 20})
    assert learning.history
    assert all(entry["perplexity_after"] < entry["perplexity_before"] for entry in learning.history)


def plain(model):
    def generate(ids, mask):
        with unpacked(model):
            return model.generate(ids, attention_mask=mask, use_cache=True, **GREEDY | {"max_new_tokens": 20})

    return generate


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("converted", [False, True])
def test_families(name, converted):
    model = tiny_model(name, dtype=torch.float32)
    if converted:
        convert_model(model, 16, 4)
    at_rate_zero_and_learning(model, plain(model))


def test_a_model_with_adapters_of_its_own_writes_with_both():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = snapshot(model)
    at_rate_zero_and_learning(model, plain(model))
    assert_same(before, snapshot(model))


@pytest.fixture
def folder(tmp_path):
    # quantised layers work on blocks of 64
    tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_in_4_bits(folder):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    at_rate_zero_and_learning(model, plain(model), rows=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.generate(random_ids(1, 12), max_new_tokens=2)  # on some CPUs this packs the weights
    with temp_lora(model, epochs=8, **SETTINGS) as learner:
        learned = learner.learn(random_ids(1, 20), random_ids(1, 40, seed=1))
    assert learned.losses[-1] < 0.95 * learned.losses[0]


def test_an_optimiser_in_8_bits_learns():
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    model, ids = tiny_llama(), random_ids(1, 60)
    with temp_lora(model, optimizer_8bit=True, epochs=8, **SETTINGS) as learner:
        learned = learner.learn(ids[:, :20], ids[:, 20:])
        (optimizer,) = learner._optimizers
        assert all(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    assert learned.losses[-1] < 0.95 * learned.losses[0]


def test_a_run_with_an_optimiser_in_8_bits_resumes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    ids = random_ids(2, 12)
    settings = {"chunk_tokens": 7, "context_tokens": 20, "optimizer_8bit": True} | LEARN | {"learning_rate": 1e-3}
    expected = TempLoraGenerator(model_with_end(), **settings).generate(ids, **GREEDY)
    with pytest.raises(Killed):
        TempLoraGenerator(model_with_end(), checkpoint_dir=tmp_path, **settings).generate(
            ids, stopping_criteria=[KillAt(35)], **GREEDY
        )
    again = TempLoraGenerator.resume(tmp_path, model_with_end(), stopping_criteria=[StopAt(10**9)])
    assert torch.equal(again, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError, Stop])
@pytest.mark.parametrize(
    ("holder", "where", "call"),
    [
        (Learner, "learn", 2),
        (Learner, "score", 3),  # without dropout before learning, then after it
        (run.Run, "_rebuild", 2),
        (run, "save_run", 3),  # the first at the start
        (Streamer, "put", 10),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_breaks_leaves_nothing_behind(error, holder, where, call, monkeypatch, tmp_path):
    model = model_with_end(converted=True).train()
    before = snapshot(model)
    calls = []

    def breaking(*args, **kwargs):
        calls.append(where)
        if len(calls) == call:
            raise error("now")
        return original(*args, **kwargs)

    original = getattr(holder, where)
    monkeypatch.setattr(holder, where, breaking)
    settings = {"checkpoint_dir": tmp_path} | LEARN | {"dropout": 0.1}
    generator = TempLoraGenerator(model, chunk_tokens=7, context_tokens=20, **settings)
    with pytest.raises(error):
        generator.generate(random_ids(1, 9), streamer=Streamer(), **GREEDY)
    assert_same(before, snapshot(model))
    learned = 2 if where == "save_run" else 1
    assert len(generator.history) == learned  # what was learned before is still there to be looked at


def test_the_bar_tells_of_losses(capsys):
    generator = TempLoraGenerator(model_with_end(), chunk_tokens=7, context_tokens=20, **LEARN | {"progress": True})
    generator.generate(random_ids(1, 9), **GREEDY)
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "ppl=" in shown
    assert "after=" in shown
    assert "tok/s" in shown


def test_what_is_kept_does_not_grow():
    """Of a converted model: the same bytes live after 20 chunks as after 5, but for the text itself."""
    held = []
    model = model_with_end(converted=True)
    for chunks in (5, 20):
        generator = TempLoraGenerator(model, chunk_tokens=8, context_tokens=16, **LEARN)
        output = generator.generate(
            random_ids(1, 9), do_sample=False, max_new_tokens=8 * chunks, return_dict_in_generate=True
        )
        cache = output.past_key_values
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
        assert len(generator.history) == chunks - 1
    assert held[0] == held[1]


SMALL = [
    "--local-branch",
    "64",
    "--global-branch",
    "4",
    "--chunk-tokens",
    "64",
    "--context-tokens",
    "64",
    "--rank",
    "8",
    "--dropout",
    "0",
    "--learning-rate",
    "2e-3",
]


def walk(books, *more):
    return main(["eval", "temp-lora", "demo", *map(str, books), *SMALL, *map(str, more)])


def test_the_command_walks_writes_and_goes_on(tmp_path, capsys):
    books = []
    for number in range(2):
        books.append(tmp_path / f"book{number}.txt")
        books[-1].write_text("The king of France went up the hill with forty thousand men. " * 40, encoding="utf-8")
    out, plot = tmp_path / "out.jsonl", tmp_path / "plot.png"
    options = ("--tokens", 320, "--inference-context-tokens", 32, 64, "--bucket-tokens", 100, "--bucket-start", 100)
    options += ("--length-buckets", 200, "--resume", tmp_path / "walk", "--out", out, "--plot", plot)
    assert walk(books, *options) == 0
    shown = capsys.readouterr().out
    assert "perplexity below the base, context 32" in shown
    assert "chunk means" in shown
    assert plot.stat().st_size > 1000
    records = read_records(out)
    assert {r["metric"] for r in records} == {"perplexity", "mean_chunk_perplexity", "time"}
    whole = {
        r["settings"]["arm"]: r["value"]
        for r in records
        if r["metric"] == "perplexity"
        and (r["settings"]["text"], r["settings"]["by"]) == ("2 texts", "document length")
    }
    assert set(whole) == {"base", "32", "64"}
    assert max(whole["32"], whole["64"]) < 0.9 * whole["base"]
    starts = {r["settings"]["start"] for r in records if r["settings"].get("by") == "tokens read"}
    assert starts == {100, 200, 300}
    assert walk(books, *options) == 0  # all of it is there
    assert [r["value"] for r in read_records(out)] == [r["value"] for r in records]
    assert walk(books, *options, "--rank", 4) == 2
    assert "another walk" in capsys.readouterr().err
    assert walk(books, *options, "--rope-theta", 80_000) == 2
    assert "another model" in capsys.readouterr().err


def test_records_hold_every_setting(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("To be or not to be, that is the question. " * 20, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert walk([book], "--tokens", 130, "--fresh-base", "--no-context-grad", "--out", out) == 0
    settings = read_records(out)[0]["settings"]
    assert json.dumps(settings)
    assert settings["fresh_base"] is True
    assert settings["learn"]["context_grad"] is False
    assert (settings["learn"]["rank"], settings["learn"]["alpha"]) == (8, 8)


def test_a_fresh_base_is_there_for_each_context(tmp_path, capsys):
    book, out, plot = tmp_path / "book.txt", tmp_path / "out.jsonl", tmp_path / "plot.png"
    book.write_text("To be or not to be, that is the question. " * 20, encoding="utf-8")
    options = ("--tokens", 130, "--fresh-base", "--inference-context-tokens", 32, 64, "--out", out)
    assert walk([book], *options, "--bucket-start", 5000, "--plot", plot) == 0
    shown = capsys.readouterr().out
    assert "no text is longer than --bucket-start 5,000" in shown
    assert not plot.exists()
    assert shown.count("below base") == 2
    values = {r["settings"]["arm"]: r["value"] for r in read_records(out) if r["metric"] == "perplexity"}
    assert set(values) == {"base 32", "base 64", "32", "64"}
    assert values["base 32"] > values["base 64"]


def test_an_encoder_or_something_else_is_refused():
    for model in (torch.nn.Linear(2, 2), None):
        with pytest.raises(LongpatchError, match="not a model of transformers"):
            TempLoraGenerator(model)


def test_the_straight_loop_with_peft_loses_the_same():
    """What the benchmark compares with learns what the generator learns, chunk for chunk."""
    model, text = model_with_end(), random_ids(1, 60)[0]
    settings = {"chunk": 9, "context": 16, "rank": 4, "rate": 1e-3, "epochs": 2}
    before = snapshot(model)["state"]
    ours, _, _ = generator_run(model, text, grad=True, **settings)
    theirs, _ = straight_loop(model, text, **settings)
    assert len(ours) == len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-4)
    detached, _, _ = generator_run(model, text, grad=False, **settings)
    assert detached[0] == pytest.approx(ours[0], rel=1e-5)
    assert detached[1:] != pytest.approx(ours[1:], rel=1e-7)
    after = snapshot(model)["state"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
