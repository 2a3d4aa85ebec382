"""A small run of every `longpatch eval` command, on the small model, in a folder that `write_files` filled."""

import json
from pathlib import Path

from tests.evaluating import STORY, WINDOW, write_rows

PLACED = ["--lengths", "96,112", "--depths", "1", "--trials", "2", "--new-tokens", "3"]
NEEDLE = ["--needle", " He ate.", "--question", " What?", "--target", "He ate", "--metrics", "match"]
LEARN = ["--rank", "2", "--dropout", "0.1", "--learning-rate", "2e-3", "--epochs", "1"]
COMMANDS = {
    "perplexity": ["texts", "--bucket", "40"],
    "passkey": [*PLACED, "--digits", "3"],
    "needle": ["texts", *PLACED, *NEEDLE],
    "topic": ["--topics", "1", "--turns", "1", "--lines", "2", "--trials", "2", "--new-tokens", "2"],
    "qa": ["qa.jsonl", "--new-tokens", "3", "--context-tokens", "40"],
    "generation": ["texts", "--positions", "24,40", "--new-tokens", "4"],
    "translation": ["segments.jsonl", "--new-tokens", "3", "--temp-lora", *LEARN],
    "distance": ["texts", "--length", "90", "--scored", "16"],
    "memory": ["--text", "texts/a.txt", "--lengths", "96,160,192", "--new-tokens", "2", "--chunk", "64"],
    "attention": ["texts", "--length", "48"],
    "temp-lora": ["texts", "--tokens", "96", "--chunk-tokens", "24", "--context-tokens", "24", *LEARN],
}
MEASURED = ("prefill", "decode", "peak_memory", "time")  # by the clock, or by the system


def arguments_of(name: str) -> list[str]:
    return ["eval", name, "demo", *COMMANDS[name], *WINDOW]


def write_files(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number, name in enumerate("abc"):
        (folder / "texts" / f"{name}.txt").write_text(STORY[number:] * 4, encoding="utf-8")
    rows = [{"context": STORY[n:] * 3, "question": "What was seen?", "answers": ["a light"]} for n in range(3)]
    write_rows(folder / "qa.jsonl", rows)
    pairs = [{"source": f"Schiff {n}", "target": f"ship {n}"} for n in range(2)]
    write_rows(folder / "segments.jsonl", [{"segments": pairs, "id": name} for name in "abc"])


def read(path: Path) -> list[dict]:
    """The records of a file, without the values that no two runs share."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record | {"value": None} if record["metric"] in MEASURED else record for record in records]
