"""Files become rows: every token once, labels where they belong, wrong input named by file and line."""

import json

import numpy as np
import pytest
import torch

from longpatch import LongpatchError
from longpatch.data import Rows, load_rows, pad_right
from longpatch.data.binary import sidecar, write_binary
from longpatch.data.settings import DataSection
from longpatch.demo import load

WORDS = "All work and no play makes a long text. "


@pytest.fixture(scope="module")
def tokenizer():
    return load()[1]


@pytest.fixture
def books(tmp_path):
    for number, words in enumerate((30, 50)):
        (tmp_path / f"{number}.txt").write_text(WORDS * words)
    return str(tmp_path)


def section(**settings):
    return DataSection(**{"train": "", "length": 64} | settings)


def all_tokens(rows):
    return torch.cat([row["input_ids"] for row in rows])


def texts(books, tokenizer):
    return torch.cat([torch.tensor(tokenizer.encode(WORDS * words)) for words in (30, 50)])


def test_packed_rows_hold_every_token_once(books, tokenizer):
    rows = load_rows(books, section(), tokenizer)
    assert torch.equal(all_tokens(rows[i] for i in range(len(rows))), texts(books, tokenizer))
    assert {len(rows[i]["input_ids"]) for i in range(len(rows) - 1)} == {64}
    assert torch.equal(rows[3]["labels"], rows[3]["input_ids"])


def test_rows_that_start_with_bos(books, tokenizer):
    rows = load_rows(books, section(bos=True), tokenizer)
    bos = tokenizer.bos_token_id
    for i in range(1, len(rows)):
        row = rows[i]
        assert row["input_ids"][0] == bos
        assert len(row["input_ids"]) <= 64
        assert row["labels"][0] == -100
    rest = [rows[i]["input_ids"][min(i, 1) :] for i in range(len(rows))]
    assert torch.equal(torch.cat(rest), texts(books, tokenizer))


def test_one_document_a_row(books, tokenizer):
    rows = load_rows(books, section(pack=False, length=400), tokenizer)
    lengths = [len(tokenizer.encode(WORDS * words)) for words in (30, 50)]
    assert [len(rows[i]["input_ids"]) for i in range(2)] == [min(length, 400) for length in lengths]
    assert len(load_rows(books, section(pack=False, length=10_000, min_length=lengths[0] + 1), tokenizer)) == 1
    with pytest.raises(LongpatchError, match="no row of at least 5000"):
        load_rows(books, section(pack=False, length=10_000, min_length=5000), tokenizer)


@pytest.mark.parametrize("settings", [{}, {"bos": True}, {"pack": False, "length": 300}])
def test_streamed_rows_are_the_same_over_and_over(books, tokenizer, settings):
    rows = load_rows(books, section(**settings), tokenizer)
    stream = iter(load_rows(books, section(**settings), tokenizer, streaming=True))
    for _ in range(2):
        for i in range(len(rows)):
            row, expected = next(stream), rows[i]
            assert torch.equal(row["input_ids"], expected["input_ids"])
            assert torch.equal(row["labels"], expected["labels"])


def test_only_answers_are_trained(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Say it.", "input": "Now.", "output": "It was dark."},
        {"input": "Say it.", "output": "Stormy."},
        {"text": "A plain text."},
    ]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    read = load_rows(str(path), section(pack=False), tokenizer)
    trained = [tokenizer.decode(row["labels"][row["labels"] >= 0]) for row in (read[i] for i in range(3))]
    assert trained == ["It was dark.<s>", "Stormy.<s>", "<s>A plain text."]
    assert tokenizer.decode(read[0]["input_ids"]) == "<s>Say it.\n\nNow.\nIt was dark.<s>"
    packed = load_rows(str(path), section(), tokenizer)
    assert (packed[0]["labels"] >= 0).sum() == sum((read[i]["labels"] >= 0).sum() for i in range(3))


def test_messages_train_the_assistant_alone(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    turns = [("user", "Hello?"), ("assistant", "Yes."), ("user", "Bye."), ("assistant", "So long.")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    with pytest.raises(LongpatchError, match=r"rows.jsonl:1: the tokenizer has no chat template"):
        load_rows(str(path), section(pack=False), tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        row = load_rows(str(path), section(pack=False), tokenizer)[0]
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(row["labels"][row["labels"] >= 0]) == "Yes.\nSo long.\n"


@pytest.mark.parametrize("vocabulary", [0, 70_000])
def test_token_files(tmp_path, tokenizer, vocabulary, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 4096, 1000)
    path = tmp_path / "tokens.bin"
    if vocabulary:
        monkeypatch.setattr(type(tokenizer), "__len__", lambda self: vocabulary)
    write_binary(path, ids, tokenizer)
    rows = load_rows(str(path), section(), tokenizer)
    assert isinstance(rows, Rows)
    assert isinstance(rows.tokens, np.memmap)
    assert path.stat().st_size == 1000 * (4 if vocabulary else 2)
    assert torch.equal(all_tokens(rows[i] for i in range(len(rows))), torch.from_numpy(ids))


def test_what_is_wrong_is_named(tmp_path, tokenizer):
    def refused(path, match, **settings):
        with pytest.raises(LongpatchError, match=match):
            load_rows(str(path), section(**settings), tokenizer)

    refused(tmp_path / "none.txt", "no file .*none.txt")
    refused(tmp_path, "no .txt or .jsonl file in")
    (tmp_path / "a.csv").write_text("1")
    refused(tmp_path / "a.csv", r"a.csv is neither .txt nor .jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refused(tmp_path / "a.txt", r"a.txt is not UTF-8")
    lines = tmp_path / "a.jsonl"
    for second, match in (
        ('{"text": ', "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"a": 1}', "has the fields a"),
    ):
        lines.write_text('{"text": "x y z"}\n' + second)
        refused(lines, f"a.jsonl:2 {match}")
    tokens = tmp_path / "a.bin"
    tokens.write_bytes(b"\0" * 20)
    refused(tokens, "no usable description a.json")
    sidecar(tokens).write_text('{"dtype": "uint16", "vocabulary": 5, "tokens": 11}')
    refused(tokens, "has 20 bytes, not 11 tokens.*made for 5 tokens, the tokenizer has 4096")
    refused(tokens, "one .bin by itself", pack=False)


def test_batches_are_padded_on_the_right():
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 1)]
    batch = pad_right(rows)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, -100, -100]]
