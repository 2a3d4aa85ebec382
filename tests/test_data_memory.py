"""A gigabyte of text becomes tokens and rows in less memory than that."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from longpatch.demo.text import read_text

SIZE, FILES, ALLOWED = 10**9, 20, 10**9  # bytes, files, bytes
PACK = """
import sys
from longpatch.data import DataSection, load_rows
from longpatch.models import load_tokenizer
rows = load_rows(sys.argv[2], DataSection(train=sys.argv[2], length=8192), load_tokenizer(sys.argv[1]))
print(sum(len(row["input_ids"]) for row in rows))
"""
IDLE = "import longpatch.cli.tokenize, longpatch.data, sys; print(1, flush=True); sys.stdin.read()"


def memory(process: int) -> int:
    """Bytes of a process and all below it, shared pages counted once."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {process}
    while True:
        more = {child for child, parent in parents.items() if parent in family} - family
        if not more:
            break
        family |= more
    total = 0
    for member in family:
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        total += int(rollup.partition("Pss:")[2].split()[0]) * 1024
    return total


def peak(*command: str) -> tuple[int, str]:
    """Most memory that a command has while it runs, and what it prints."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.25)
    assert process.returncode == 0
    assert process.stdout is not None
    return most, process.stdout.read()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_gigabyte_is_tokenised_and_packed_in_bounded_memory(tmp_path):
    """With a tokenizer of whole words, which is fast: what is held does not depend on it."""
    text = read_text(None)[0]
    words = sorted({word for word, _ in Whitespace().pre_tokenize_str(text)} - {"?"})
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    model, books, out = tmp_path / "model", tmp_path / "books", tmp_path / "books.bin"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    books.mkdir()
    times = SIZE // FILES // len(text.encode()) + 1
    for number in range(FILES):
        (books / f"{number}.txt").write_text(text * times)
    assert sum(file.stat().st_size for file in books.iterdir()) >= SIZE
    with subprocess.Popen([sys.executable, "-c", IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert idle.stdin is not None
        assert idle.stdout is not None
        idle.stdout.readline()
        imported = memory(idle.pid)
        idle.stdin.close()
    began = time.monotonic()
    tokenised, _ = peak("-m", "longpatch.cli", "tokenize", str(model), str(books), str(out), "--workers", "2")
    seconds = time.monotonic() - began
    packed, printed = peak("-c", PACK, str(model), str(out))
    tokens = json.loads(out.with_suffix(".json").read_text())["tokens"]
    print(f"imported {imported / 1e6:.0f} MB, tokenised {(tokenised - imported) / 1e6:.0f} MB above it", end=", ")
    print(f"packed {(packed - imported) / 1e6:.0f} MB above it; {tokens:,} tokens in {seconds:.0f} s")
    assert int(printed) == tokens
    assert tokenised - imported < ALLOWED
    assert packed - imported < ALLOWED
