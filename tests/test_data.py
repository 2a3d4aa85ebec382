"""Files become rows: every token once, labels where they belong, wrong input named by file and line."""

import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from longpatch import LongpatchError
from longpatch.adapter import read_record
from longpatch.cli import main
from longpatch.data import Rows, load_rows, pad_right, sources
from longpatch.data.binary import read_binary, sidecar, write_binary
from longpatch.data.documents import Encoder
from longpatch.data.mixture import Part, choose_rows
from longpatch.data.settings import DataSection
from longpatch.data.tokenize import tokenize
from longpatch.demo import load
from longpatch.finetune import TrainConfig, train
from longpatch.templates import find_template, render

ROWS = Path(__file__).parent.parent / "examples" / "rows"
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
    return torch.cat([rows[i]["input_ids"] for i in range(len(rows))])


def trained(row, tokenizer):
    return tokenizer.decode(row["labels"][row["labels"] >= 0])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(books, tokenizer):
    return torch.cat([torch.tensor(tokenizer.encode(WORDS * words)) for words in (30, 50)])


def test_packed_rows_hold_every_token_once(books, tokenizer):
    rows = load_rows(books, section(), tokenizer)
    assert torch.equal(all_tokens(rows), texts(books, tokenizer))
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


QUESTIONS = [
    {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]},
    {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
    {
        "conversations": [
            {"from": "gpt", "value": "?"},
            {"from": "user", "value": "Hello?"},
            {"from": "gpt", "value": "Yes."},
        ]
    },
    {"conversations": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]},
    {"input": "Hello?", "output": "Yes."},
    {"instruction": "Hello?", "input": "", "output": "Yes."},
]


@pytest.mark.parametrize("template", ["none", "vicuna", "llama-2", "mistral"])
def test_all_kinds_of_rows_are_the_same_and_train_the_answer_alone(tmp_path, tokenizer, template):
    path = write(tmp_path / "rows.jsonl", QUESTIONS)
    rows = load_rows(path, section(pack=False, length=200, template=template), tokenizer)
    assert len(rows) == len(QUESTIONS)
    for row in rows:
        assert torch.equal(row["input_ids"], rows[0]["input_ids"])
        assert trained(row, tokenizer).strip() in ("Yes.<s>", "Yes. <s>")
        whole = render(tokenizer, find_template(tokenizer, template), QUESTIONS[0]["messages"])
        assert tokenizer.decode(row["input_ids"]) == whole


def test_each_answer_is_trained_with_its_end_and_nothing_after_it(tmp_path, tokenizer):
    turns = [("system", "Be."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Bye."), ("assistant", "So long.")]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("user", "More?")]]
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<s>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = load_rows(path, section(pack=False, template=str(file)), tokenizer)[0]
    assert trained(row, tokenizer) == "Yes.<s>So long.<s>"
    expected = "[system]Be.<s>\n[user]Hello?<s>\n[assistant]Yes.<s>\n[user]Bye.<s>\n[assistant]So long.<s>\n"
    assert tokenizer.decode(row["input_ids"]) == expected
    file.write_text("{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}")
    with pytest.raises(LongpatchError, match=r"rows.jsonl:1: the chat template rewrites earlier turns"):
        load_rows(path, section(pack=False, template=str(file)), tokenizer)


def test_long_conversations_are_dropped_long_texts_cut_and_both_counted(tmp_path, tokenizer):
    rows = [{"input": WORDS * 10, "output": "Yes."}, QUESTIONS[-2], {"text": WORDS * 10}, {"text": ""}, {"text": "x"}]
    path = write(tmp_path / "rows.jsonl", rows)
    read = load_rows(path, section(pack=False, min_length=4), tokenizer)
    lengths = [len(row["input_ids"]) for row in read]
    assert len(lengths) == 2
    assert lengths[1] == 64 > lengths[0]
    (count,) = read.counts
    found = (count.documents, count.long, count.cut, count.short, count.empty)
    assert found == (3, 1, 1, 1, 1)
    assert count.tokens == len(read.tokens)
    assert count.trained == read.trained.sum()
    stream = load_rows(path, section(pack=False, min_length=4), tokenizer, streaming=True)
    rows_again = iter(stream)
    for row in read:
        assert torch.equal(next(rows_again)["input_ids"], row["input_ids"])
    next(rows_again)  # of the second pass, before which the long row came once more
    assert (stream.counts[0].long, stream.counts[0].cut) == (2, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_bos_takes_no_answer_its_end(tmp_path, tokenizer, streaming):
    path = write(tmp_path / "rows.jsonl", [{"input": WORDS * 10, "output": "Yes."}, {"input": "Who?", "output": "I."}])
    (long, short) = load_rows(path, section(pack=False, length=500), tokenizer)
    size = len(long["input_ids"])
    for length, kept in ((size + 1, long), (size, short)):
        rows = load_rows(path, section(pack=False, bos=True, length=length), tokenizer, streaming=streaming)
        row = next(iter(rows))
        assert row["labels"][-1] == kept["labels"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= length
        assert torch.equal(row["input_ids"][-len(kept["input_ids"]) :], kept["input_ids"])
        assert rows.counts[0].long == (kept is short)


def test_a_mixture_takes_what_it_says_of_each_part(tmp_path, tokenizer):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}."} for number in range(20)])

    def read(train, **settings):
        rows = load_rows(train, section(pack=False, data_root=str(tmp_path), **settings), tokenizer)
        return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]

    mixed = read({"a.jsonl": 1, "b.jsonl[5]": 1, "c.jsonl[10]": 2.5})
    parts = {name: [text for text in mixed if text[0] == name] for name in "abc"}
    assert parts["a"] == [f"a {number}." for number in range(20)]
    assert len(set(parts["b"])) == len(parts["b"]) == 5
    assert (len(set(parts["c"])), len(parts["c"])) == (10, 25)
    assert parts["c"][:10] == parts["c"][10:20]
    assert {text[0] for text in mixed[:8]} == {text[0] for text in mixed[-8:]} == set("abc")  # spread evenly
    assert read({"a.jsonl": 1, "b.jsonl[5]": 1, "c.jsonl[10]": 2.5}) == mixed
    assert read(["b.jsonl[5]"]) == parts["b"]
    assert read(["b.jsonl[5]"], seed=1) != parts["b"]
    with pytest.raises(LongpatchError, match="a path is named twice"):
        read(["a.jsonl", "a.jsonl"])


def test_a_home_folder_is_found(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", [{"text": "a b c."}])
    assert len(load_rows("a.jsonl", section(data_root="~"), tokenizer)) == 1
    assert len(load_rows("~/a.jsonl", section(), tokenizer)) == 1


def test_choosing_all_rows_takes_no_memory_for_each():
    tracemalloc.start()
    passes = choose_rows(Part("a", "a", weight=2.0), 2_000_000, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(chosen) for chosen in passes] == [2_000_000, 2_000_000, 0]
    assert peak < 100_000


def test_where_all_is_too_long_it_is_said(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"input": WORDS * 10, "output": "Yes."}] * 3)
    with pytest.raises(LongpatchError, match=r"no row of at least 2 tokens.*3 conversations have more than length=64"):
        load_rows(path, section(), tokenizer)


def test_a_hub_data_set_is_streamed_capped_and_comes_last(tmp_path, tokenizer, monkeypatch):
    class Stream(list):
        def shuffle(self, seed):
            return Stream(reversed(self))

    asked = []
    found = Stream({"text": f"h {number}."} for number in range(5))
    load_dataset = lambda name, kind, split, streaming: asked.append((name, kind, split)) or found  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    write(tmp_path / "a.jsonl", [{"text": "a 0."}])
    settings = section(pack=False, data_root=str(tmp_path), cache=str(tmp_path / "cache"))
    rows = load_rows(["hub:some/name:test[2]", "a.jsonl"], settings, tokenizer)
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert texts == ["a 0.", "h 4.", "h 3."]
    assert asked == [("some/name", None, "test")]
    load_rows(["hub:some/name/en[2]"], settings, tokenizer)
    assert asked[1:] == [("some/name", "en", "train")]
    found[4] = {"text": 4}
    with pytest.raises(LongpatchError, match=r"hub:some/name:test:0: text=4 must be a string"):
        load_rows(["hub:some/name:test[2]"], settings, tokenizer)


def test_a_folder_is_read_through_the_package_itself(tmp_path, tokenizer):
    pytest.importorskip("datasets", reason="the package datasets is an extra")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [{"text": f"h {number}."} for number in range(5)])
    rows = load_rows([f"hub:{tmp_path}/set[2]"], section(pack=False), tokenizer)
    assert len(rows) == 2
    assert all(tokenizer.decode(row["input_ids"], skip_special_tokens=True).startswith("h ") for row in rows)
    with pytest.raises(LongpatchError, match=r"set:other cannot be opened"):
        load_rows([f"hub:{tmp_path}/set:other[2]"], section(pack=False), tokenizer)


def test_the_cache_is_read_until_content_or_settings_change(tmp_path, tokenizer, monkeypatch):
    source, cache, encoded = tmp_path / "a.txt", tmp_path / "cache", []
    source.write_text(WORDS * 50)
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, source: encoded.append(source) or original(self, source))

    def read(tokenizer=tokenizer, **settings):
        encoded.clear()
        rows = load_rows(str(source), section(cache=str(cache), **settings), tokenizer)
        return all_tokens(rows), rows.counts, len(encoded)

    tokens, counts, times = read()
    assert times == 1
    again, counts_again, times = read(workers=1, bos=False)
    assert torch.equal(again, tokens)
    assert counts_again == counts
    assert times == 0
    assert read(length=65)[2] == 1
    assert read(template="vicuna")[2] == 1
    other = load()[1]
    other.eos_token = "a"
    assert read(tokenizer=other)[2] == 1
    source.write_text(WORDS * 51)
    assert read()[2] == 1
    source.write_bytes(b"good\n\xff bad")
    kept = sorted(cache.iterdir())
    with pytest.raises(LongpatchError, match=r"a.txt:2 is not UTF-8"):
        read()
    assert sorted(cache.iterdir()) == kept


def test_the_cache_finds_files_that_were_moved(tmp_path, tokenizer, monkeypatch):
    encoded = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, source: encoded.append(source) or original(self, source))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(WORDS * 50)
        load_rows("a.txt", section(cache=str(tmp_path / "cache"), data_root=str(tmp_path / name)), tokenizer)
    assert len(encoded) == 1


@pytest.mark.parametrize("kind", ["byte-level", "words"])
def test_a_text_in_pieces_is_the_text(tmp_path, tokenizer, monkeypatch, kind):
    """Also where a tokenizer puts a space before the first word of whatever it gets."""
    if kind == "words":
        vocabulary = {
            token: number for number, token in enumerate(["?", "\n", "▁night", "night", "▁it", "▁was", "▁dark"])
        }
        words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
        words.pre_tokenizer = Sequence([Split("\n", "isolated"), Metaspace(prepend_scheme="first", split=True)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    text = "it was dark\nnight it was dark\n\n  night\nit was\nnight night\n" * 40 + "night " * 100
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr(sources, "PIECE", 100)
    pieces = list(sources.read_rows([path], range(1)))
    assert len(pieces) > 20
    assert "".join(piece.row["text"] for piece in pieces) == text
    encoder = Encoder(tokenizer)
    ids = np.concatenate([encoder((0, piece)).ids for piece in pieces])
    assert ids.tolist() == tokenizer.encode(text)
    monkeypatch.undo()
    rows = load_rows(str(path), section(pack=False, length=150), tokenizer)
    assert rows[0]["input_ids"].tolist() == tokenizer.encode(text)[:150]


def test_tokenize_makes_what_training_reads_from_texts(books, tmp_path, tokenizer, capsys):
    out = tmp_path / "books.bin"
    assert main(["tokenize", "demo", books, str(out), "--workers", "2"]) == 0
    assert "       2" in capsys.readouterr().out
    from_texts, from_file = load_rows(books, section(), tokenizer), load_rows(str(out), section(), tokenizer)
    assert torch.equal(all_tokens(from_file), all_tokens(from_texts))
    described = json.loads(sidecar(out).read_text())
    assert described["tokens"] == len(from_texts.tokens) == described["counts"][0]["tokens"]


def test_a_failed_tokenize_leaves_what_was_there(tmp_path, tokenizer):
    good, bad, out = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "out.bin"
    good.write_text(WORDS)
    bad.write_text('{"text": "fine"}\n{"input": "?", "output": "!"}\n')
    with pytest.raises(LongpatchError, match=r"b.jsonl:2 is a conversation.*plain texts"):
        tokenize(tokenizer, [str(good), str(bad)], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]
    tokenize(tokenizer, [str(good)], out)
    before = out.read_bytes()
    with pytest.raises(LongpatchError):
        tokenize(tokenizer, [str(good), str(bad)], out)
    assert out.read_bytes() == before
    assert len(load_rows(str(out), section(length=4), tokenizer)) > 1


def test_inspect_data_shows_rows_marks_answers_and_draws(tmp_path, capsys):
    rows = [*QUESTIONS, {"input": WORDS * 200, "output": "Long."}, {"input": WORDS * 900, "output": "Longer."}]
    write(tmp_path / "rows.jsonl", rows)
    config, plot = tmp_path / "c.yaml", tmp_path / "lengths.png"
    config.write_text(
        f"model: {{name: demo}}\noutput: none\ndata:\n  data_root: {tmp_path}\n  length: 9000\n  pack: false\n"
        "  train:\n    rows.jsonl[8]: 1\n"
    )
    assert main(["inspect-data", str(config), "--rows", "7", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("<s>Hello?\n⟦Yes.<s>⟧") == len(QUESTIONS)
    assert " tokens ... " in shown
    assert "⟦Long.<s>⟧" in shown
    assert "rows.jsonl[8]" in shown
    assert plot.stat().st_size > 1000
    encoder = Encoder(load()[1])
    sizes = [len(encoder((0, sources.Source("", row))).ids) for row in rows]
    assert sizes[-1] > 9000 > sizes[-2]
    quarters = ", ".join(f"{value:,.0f}" for value in np.percentile(sizes, (0, 25, 50, 75, 100)))
    assert f"by quarters: {quarters};" in shown  # with the one that is too long


def test_inspect_data_reads_of_a_stream_what_it_shows(tmp_path, capsys, monkeypatch):
    def endless():
        yield from ({"text": f"h {number}."} for number in range(10))
        raise AssertionError("read too far")

    stream = SimpleNamespace(load_dataset=lambda *names, **options: endless())
    monkeypatch.setitem(sys.modules, "datasets", stream)
    config, plot = tmp_path / "c.yaml", tmp_path / "lengths.png"
    config.write_text(
        "model: {name: demo}\noutput: none\ntraining: {max_steps: 1}\n"
        "data: {train: hub:x, length: 64, pack: false, streaming: true}\n"
    )
    assert main(["inspect-data", str(config), "--rows", "4", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- row") == 4
    assert "--- row 3: " in shown
    assert not plot.exists()


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
    assert torch.equal(all_tokens(rows), torch.from_numpy(ids))


def test_batches_are_padded_on_the_right():
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 1)]
    batch = pad_right(rows)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, -100, -100]]


def test_the_rows_of_both_recipes_train(tmp_path):
    """LongQLoRA's {text} and {input, output}, the 80K recipe's {conversations} with roles; by weight, cap and cache."""
    config = TrainConfig.from_dict(
        {
            "model": {"name": "demo"},
            "data": {
                "data_root": str(ROWS),
                "train": {"longqlora-pretrain.jsonl": 1, "longqlora-sft.jsonl[1]": 2, "llama3-80k.jsonl": 1},
                "template": "vicuna",
                "length": 512,
                "pack": False,
                "cache": str(tmp_path / "cache"),
            },
            "lora": {"r": 2},
            "training": {
                "max_steps": 12,
                "per_device_train_batch_size": 2,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "use_cpu": True,
            },
            "output": str(tmp_path / "out"),
        }
    )
    folder = train(config)
    counts = {count["name"]: count for count in read_record(folder)["data"]}
    assert counts["longqlora-sft.jsonl[1]"]["documents"] == 2
    for name in ("longqlora-pretrain.jsonl", "llama3-80k.jsonl"):
        lines = len((ROWS / name).read_text().splitlines())
        assert counts[name]["documents"] + counts[name]["long"] == lines
    assert counts["llama3-80k.jsonl"]["trained"] < counts["llama3-80k.jsonl"]["tokens"]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [step["loss"] for step in history if "loss" in step]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])  # six rows, each read four times


def test_a_vocabulary_may_leave_numbers_out(tmp_path):
    """As many words as fit into uint16, the last of them beyond it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 7, "?": 70_000}, "?")))
    ids = np.array([0, 7, 70_000])
    write_binary(tmp_path / "ids.bin", ids, tokenizer)
    assert read_binary(tmp_path / "ids.bin", tokenizer).tolist() == ids.tolist()
