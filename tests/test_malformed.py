"""Thirty-odd wrong inputs: one line each that says which file, which line and what; nothing is left half-written."""

import json

import numpy as np
import pytest

from longpatch import LongpatchError
from longpatch.cli import main
from longpatch.data import load_rows
from longpatch.data.binary import sidecar, write_binary
from longpatch.data.settings import DataSection
from longpatch.data.tokenize import tokenize
from longpatch.demo import load
from longpatch.evaluation.documents import read_documents, read_rows
from longpatch.evaluation.qa import qa_samples

GOOD = '{"text": "a good row"}\n\n{"input": "a good", "output": "row"}\n'
LINES = {  # what stands in line 4 of a file: what is said about it
    '{"text": ': "is not JSON",
    "{'text': 'x'}": "is not JSON",
    "[" * 100_000: "is not JSON",
    '{"text": ' + "7" * 5000 + "}": "is not JSON",
    '{"text": "half of one: \\ud800"}': "holds a lone surrogate",
    '{"input": "\\udc00", "output": "x"}': "holds a lone surrogate",
    '["text"]': "is not a JSON object",
    "null": "is not a JSON object",
    "{}": "the fields are none",
    '{"content": "x"}': "the fields are content",
    '{"text": 5}': "text=5 must be a string",
    '{"text": null}': "text=None must be a string",
    '{"messages": []}': r"messages=\[\] must be a list",
    '{"messages": "Hi"}': "messages='Hi' must be a list",
    '{"messages": ["Hi"]}': r"messages\[0\]='Hi' is not \{role, content\}",
    '{"messages": [{"role": "user"}]}': r"messages\[0\]=.* is not \{role, content\}",
    '{"messages": [{"role": "robot", "content": "x"}]}': r"messages\[0\].role='robot' must be one of system, user",
    '{"messages": [{"role": "user", "content": ["x"]}]}': r"messages\[0\].content=\['x'\] must be a string",
    '{"messages": [{"role": "user", "content": "x"}]}': "messages holds no answer to learn",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}': r"\[1\].content is empty",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "messages holds no answer to learn, or no question",
    '{"conversations": [{"from": "gpt", "value": "x"}]}': "conversations holds no answer to learn, or no question",
    '{"conversations": {"from": "human"}}': "conversations=.* must be a list",
    '{"conversations": [{"from": "human", "text": "x"}]}': r"conversations\[0\]=.* is not \{from, value\}",
    '{"conversations": [{"from": 7, "value": "x"}]}': r"conversations\[0\].from=7 must be one of",
    '{"conversations": [{"from": "human", "value": "x"}]}': "conversations holds no answer",
    '{"input": "x", "output": 3}': "output=3 must be a string",
    '{"input": "x", "output": ""}': "output is empty",
    '{"input": ["x"], "output": "y"}': r"input=\['x'\] must be a string",
    '{"instruction": "", "input": "", "output": "y"}': "input is empty",
    '{"output": "y"}': "the fields are output",
}
SOURCES = {
    "none.txt": r"no file .*none\.txt",
    "empty": "no .txt or .jsonl file in .*empty",
    "a.csv": r"a\.csv is neither \.txt nor \.jsonl",
    "latin.txt": r"latin\.txt:3 is not UTF-8",
    "latin.jsonl": r"latin\.jsonl:2 is not JSON",
    "good.jsonl[many]": r"good\.jsonl\[many\]: \[many\] is no number of rows",
    "good.jsonl[0]": r"\[0\] is no number of rows",
}


ROWS = {  # of a file for an evaluation: what is said about the file
    "": "holds no rows",
    "{": "is not JSON",
    '{"context": "x"}': "row 0 has no 'question'; row 0 has no 'answers'",
    '{"context": "x", "question": "?", "answers": []}': "row 0 has no 'answers'",
    '{"context": "", "question": "?", "answers": "x"}': "row 0 has no 'context'",
}
EVALUATIONS = {  # an evaluation of rows.jsonl: what is said where it holds a row of another kind
    "eval passkey demo --rows rows.jsonl": "eval passkey: row 0 has no 'input'; row 0 has no 'target'",
    "eval topic demo --rows rows.jsonl": "eval topic: row 0 has no 'prompt'; row 0 has no 'expected_number'",
    "eval translation demo rows.jsonl": "eval translation: row 0 has no segments",
    "eval perplexity demo rows.jsonl": "rows.jsonl:1 has no text in 'text'",
    "eval temp-lora demo rows.jsonl": "rows.jsonl:1 has no text in 'text'",
    "eval needle demo --rescore rows.jsonl": "rows.jsonl:1 has no command, model",
    "eval needle demo --rescore nowhere.jsonl": "nowhere.jsonl cannot be read",
    "eval generation demo story.txt --positions 100": "eval generation: no text has 200 tokens",
    "eval attention demo story.txt --pca-layer 9": "--pca-layer 9. Supported: 0 (embeddings) to 5",
    "eval temp-lora demo story.txt --tokens 1": "story.txt has no token to predict",
    "report rows.jsonl": "rows.jsonl:1 has no command, model",
}


@pytest.mark.parametrize("line", ROWS)
def test_rows_of_an_evaluation(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(LongpatchError, match=ROWS[line]):
        qa_samples(read_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_of_what_is_not_there(tmp_path, monkeypatch, capsys, command):
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "story.txt").write_text("The ship went on.")
    assert main(command.split()) == 2
    assert EVALUATIONS[command] in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizer():
    return load()[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ncaf\xe9\nfour".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    return tmp_path


def refused(folder, tokenizer, match, call, *paths, **settings):
    before = sorted(folder.rglob("*"))
    with pytest.raises(LongpatchError, match=match) as raised:
        call(*paths, **settings)
    assert "\n" not in str(raised.value)
    assert sorted(folder.rglob("*")) == before


def read(folder, tokenizer, train, **settings):
    section = DataSection(**{"train": train, "length": 64, "data_root": str(folder), "pack": False} | settings)
    return load_rows(train, section, tokenizer)


@pytest.mark.parametrize("line", LINES, ids=[line[:50] for line in LINES])
def test_a_wrong_row(folder, tokenizer, line):
    (folder / "bad.jsonl").write_text(f"{GOOD}{line}\n")
    match = rf"bad\.jsonl:4(:| ).*{LINES[line]}"
    cache = folder / "cache"
    cache.mkdir()
    refused(folder, tokenizer, match, read, folder, tokenizer, "bad.jsonl", cache=str(cache))
    (folder / "bad.jsonl").write_text('{"text": "a good row"}\n\n\n' + line)
    refused(folder, tokenizer, match, tokenize, tokenizer, [str(folder / "bad.jsonl")], out=folder / "out.bin")


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_source(folder, tokenizer, name):
    refused(folder, tokenizer, SOURCES[name], read, folder, tokenizer, ["good.jsonl", name])
    out = folder / "out.bin"
    refused(folder, tokenizer, SOURCES[name], tokenize, tokenizer, [str(folder / name)], out=out)


def test_wrong_token_files(folder, tokenizer):
    path = folder / "tokens.bin"

    def wrong(match, **changes):
        write_binary(path, np.arange(100), tokenizer)
        described = json.loads(sidecar(path).read_text()) | changes
        sidecar(path).write_text(json.dumps(described))
        refused(folder, tokenizer, match, read, folder, tokenizer, "tokens.bin", pack=True)

    wrong("tokens.bin says dtype='float16'", dtype="float16")
    wrong("tokens.bin has 200 bytes, not 100 tokens of uint32", dtype="uint32")
    wrong("has 200 bytes, not 99 tokens", tokens=99)
    wrong("was made for 5 tokens, the tokenizer has 4096", vocabulary=5)
    wrong("was made with another tokenizer", tokenizer="0123")
    wrong("no usable description tokens.json", tokens="many")
    wrong("no usable description tokens.json", dtype=["uint16"])
    wrong("no usable description tokens.json", tokenizer=None)
    write_binary(path, np.array([1, 4096]), tokenizer)
    refused(
        folder, tokenizer, "holds the id 4096 of a vocabulary of 4096", read, folder, tokenizer, "tokens.bin", pack=True
    )
    write_binary(path, np.arange(100), tokenizer)
    refused(folder, tokenizer, "one .bin by itself", read, folder, tokenizer, "tokens.bin", pack=False)
    refused(folder, tokenizer, "one .bin by itself", read, folder, tokenizer, ["tokens.bin", "good.jsonl"], pack=True)
    sidecar(path).write_text("{")
    refused(folder, tokenizer, "no usable description", read, folder, tokenizer, "tokens.bin", pack=True)
    sidecar(path).unlink()
    refused(folder, tokenizer, "no usable description", read, folder, tokenizer, "tokens.bin", pack=True)


def test_evaluations_refuse_wrong_token_files_too(folder, tokenizer):
    path = folder / "tokens.bin"
    np.arange(100).astype(np.uint16).tofile(path)
    (document,) = read_documents([path])
    assert document.ids(tokenizer, 50).tolist() == list(range(50))  # as published ones are
    path.write_bytes(b"odd")
    refused(folder, tokenizer, "has 3 bytes, not 1 tokens of uint16", document.ids, tokenizer)
    np.array([1, 5000]).astype(np.uint16).tofile(path)
    refused(folder, tokenizer, "holds the id 5000", document.ids, tokenizer)
    write_binary(path, np.arange(100), tokenizer)
    sidecar(path).write_text(json.dumps(json.loads(sidecar(path).read_text()) | {"tokenizer": "0123"}))
    refused(folder, tokenizer, "made with another tokenizer", document.ids, tokenizer)


def test_a_bare_token_file_is_refused_where_uint16_does_not_hold_the_vocabulary(folder, tokenizer, monkeypatch):
    path = folder / "tokens.bin"
    np.arange(100).astype(np.uint32).tofile(path)
    (document,) = read_documents([path])
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 70_000)
    refused(folder, tokenizer, "no description tokens.json, and uint16 does not hold 70000", document.ids, tokenizer)


@pytest.mark.parametrize("content", ["{", "[]", '{"mine": 1}', '{"dtype": "float32"}'])
def test_a_file_that_is_no_description_is_not_written_over(folder, tokenizer, content):
    (folder / "mine.json").write_text(content)
    texts = [str(folder / "good.jsonl[1]")]
    refused(
        folder, tokenizer, "mine.json exists and describes no tokens", tokenize, tokenizer, texts, folder / "mine.bin"
    )
    assert (folder / "mine.json").read_text() == content


EVALUATED = {  # the same for evaluations, which take other rows
    '{"text": ': "is not JSON",
    '["text"]': "is not a JSON object",
    '{"text": ' + "7" * 5000 + "}": "is not JSON",
    '{"text": "\\ud800"}': "holds a lone surrogate",
    '{"text": 5}': "has no text in 'text'",
    '{"messages": []}': "has no text in 'text'",
}


@pytest.mark.parametrize("line", EVALUATED, ids=[line[:50] for line in EVALUATED])
def test_evaluations_name_file_and_line(folder, tokenizer, line, capsys):
    (folder / "bad.jsonl").write_text('{"text": "a good\u2028row"}\n\n' + line)
    refused(folder, tokenizer, rf"bad\.jsonl:3 {EVALUATED[line]}", read_documents, [folder / "bad.jsonl"])
    refused_command(capsys, rf"bad.jsonl:3 {EVALUATED[line]}", "eval", "perplexity", "demo", folder / "bad.jsonl")


def refused_command(capsys, said, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown.splitlines()[-1]


def test_commands_refuse_token_files_where_they_need_texts_and_say_it_in_one_line(folder, tokenizer, capsys):
    path = folder / "tokens.bin"
    write_binary(path, np.arange(100), tokenizer)
    (folder / "bad.jsonl").write_text("[1]\n")
    texts = "tokens.bin holds token ids, where a text is needed"
    refused_command(capsys, texts, "eval", "needle", "demo", path, "--metrics", "match")
    refused_command(capsys, texts, "eval", "passkey", "demo", "--text", path)
    sidecar(path).write_text("{}")
    unusable = "tokens.bin has no usable description"
    refused_command(capsys, unusable, "eval", "distance", "demo", path, "--length", "80", "--scored", "8")
    refused_command(capsys, unusable, "eval", "temp-lora", "demo", path)
    refused_command(
        capsys, "bad.jsonl:1 is not a JSON object", "eval", "passkey", "demo", "--rows", folder / "bad.jsonl"
    )
    refused_command(
        capsys, "bad.jsonl:1 is not a JSON object", "tokenize", "demo", folder / "bad.jsonl", folder / "o.bin"
    )


def test_wrong_settings_are_told_together():
    section = DataSection(train={"a.txt": -1, "hub:x": 2}, length=1, template=3, workers=0, pack="yes", validation=7)
    reasons = "; ".join(section.reasons())
    for part in ("length=1", "workers=0", "pack='yes'", "template=3", "a.txt: weight=-1", "hub:x", "validation=7"):
        assert part in reasons
