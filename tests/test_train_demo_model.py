"""The script that makes the small model: two steps of it, and one more from where they ended."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import torch

from longpatch.models import load_model
from tests.evaluating import STORY

SCRIPT = Path(__file__).parent.parent / "examples" / "train_demo_model.py"
SMALL = "--hidden 64 --layers 1 --ffn 96 --window 64 --vocabulary 512"
SHORT = "--tokens-per-step 512 --curriculum-steps 1 --warmup-steps 1"


def script():
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_make_a_model_that_loads(tmp_path, monkeypatch):
    train = script()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    docstrings = train.standard_library_docstrings
    monkeypatch.setattr(train, "standard_library_docstrings", lambda: itertools.islice(docstrings(), 5))
    books, out, further = tmp_path / "books", tmp_path / "out", tmp_path / "further"
    books.mkdir()
    (books / "book.txt").write_text((STORY + train.passkey_line("12345")) * 20, encoding="utf-8")

    def run(*flags):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), str(books), *f"{SMALL} {SHORT}".split(), *map(str, flags)])
        train.main()

    run("--out", out, "--steps", 2, "--passkey-share", 1)
    model, tokenizer = load_model(str(out))
    assert model.config.max_position_embeddings == 64
    assert [len(model.model.layers), model.config.hidden_size, len(tokenizer)] == [1, 64, 512]
    assert tokenizer("a 12").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer(STORY[:200]).input_ids, skip_special_tokens=True) == STORY[:200]
    (made,) = json.loads((out / "training.json").read_text())
    assert (made["steps"], made["tokens"]) == (2, 1024)
    run("--out", further, "--steps", 1, "--init", out)
    runs = json.loads((further / "training.json").read_text())
    assert runs[0] == made
    assert len(runs) == 2
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [made(ids, labels=ids).loss.item() for made in (model, load_model(str(further))[0])]
    assert losses[1] < losses[0] - 0.02
    assert losses[0] < math.log(512) - 0.05
