"""Passkeys with and without recall, by length and depth.

    python -m benchmarks.recall demo BOOK.txt --lengths 1024 4096 --recall none default
    python -m benchmarks.recall smollm2 BOOK.txt --window 1024 --sinks 10 --lengths 4096 8192 --trials 1 --reach 1 \\
        --verify 4096 --space --recall none top_k=5,distance=64 top_k=16,block_tokens=16,distance=64

A trial is BOS, text of the book, the line with the key in place of as many tokens, text, the question. The key lies
after 0, 1/D, 2/D, ... of the prompt for D --depths. It counts when all tokens of the key are the model's first choice
one after the other, which is when greedy generation writes them; with --space the prompt ends with the space before the
key. Each setting of --recall is `none` or settings of `longpatch.Recall`.

All settings read a prompt once: what differs between them begins with the question. All lengths and depths of a trial
share one text, and what lies before the key; and what lies behind its reach, --reach windows further on. By default
that is one window a layer, where Λ-attention cannot tell whether the key was there. With less, tokens further on are
read as if it had not been: they could know of it only through others. --verify reads whole prompts and compares.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.haystack import NOTHING, Haystack, ask
from longpatch import Recall, convert_model
from longpatch.evaluation.passkey import ANSWER_PREFIX, passkey_line
from longpatch.models import load_model
from longpatch.results import record, write_records

COMMAND = "benchmarks.recall"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `longpatch demo`")
    parser.add_argument("text", type=Path, help="UTF-8 text to hide the key in")
    parser.add_argument("--window", type=int, help="local_branch (default: the training length)")
    parser.add_argument("--sinks", type=int, default=4, help="global_branch")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of each prompt with its answer")
    parser.add_argument("--depths", type=int, default=20, help="places of the key")
    parser.add_argument("--trials", type=int, default=10, help="trials at each depth, each in another stretch of text")
    parser.add_argument("--recall", nargs="+", default=["none", "default"], metavar="SETTINGS")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per forward")
    parser.add_argument("--reach", type=int, metavar="WINDOWS", help="windows behind the key that are read anew")
    parser.add_argument("--verify", type=int, nargs="+", default=[], help="lengths of which one prompt is read whole")
    parser.add_argument("--space", action="store_true", help="end the prompt with the space before the key")
    parser.add_argument("--show", action="store_true", help="print what was said instead of each key not found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write the results here; goes on where it was killed")
    return parser.parse_args()


class Journal:
    """What was found, one line a key, in `OUT.part`, until all are."""

    def __init__(self, out: Path | None):
        self.path = None if out is None else out.with_name(f"{out.name}.part")
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else []
        self.found = {tuple(place): hits for place, hits in map(json.loads, lines)}

    def add(self, trial: int, start: int, hits: list[tuple[int, int, str, bool]]) -> None:
        """`hits`: (length, depth, setting, whether the key was found)."""
        self.found[trial, start] = hits
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([[trial, start], hits]) + "\n")

    def tally(self) -> dict[tuple[int, str], dict[int, list[bool]]]:
        """By length and setting, by depth."""
        tally: dict[tuple[int, str], dict[int, list[bool]]] = {}
        for hits in self.found.values():
            for length, depth, setting, hit in hits:
                tally.setdefault((length, setting), {}).setdefault(depth, []).append(hit)
        return tally


class Trial:
    """One stretch of text with a key at every place that a length and a depth ask for."""

    def __init__(self, arguments, tokenizer, book: Tensor, number: int):
        def encode(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

        rng = random.Random(arguments.seed * 1000 + number)
        space = "" if arguments.space else " "
        self.question, self.number = encode(ANSWER_PREFIX + " " * arguments.space), number
        longest = max(arguments.lengths)
        first = rng.randrange(len(book) - longest)
        self.ids = torch.cat((book.new_tensor([tokenizer.bos_token_id]), book[first : first + longest - 1]))
        self.places: dict[int, list[tuple[int, int]]] = {}  # (length, depth) by first token of the line
        for length in sorted(arguments.lengths):
            for depth in range(arguments.depths):
                start = arguments.sinks + depth * length // arguments.depths
                self.places.setdefault(start, []).append((length, depth))
        self.lines, self.answers = {}, {}
        for start in sorted(self.places):
            key = f"{rng.randrange(10_000, 100_000)}"
            self.lines[start], self.answers[start] = encode(passkey_line(key)), encode(space + key)

    def end(self, start: int, length: int) -> int:
        """Tokens before the question."""
        return length - len(self.question) - len(self.answers[start])


def whole(model, trial: Trial, start: int, end: int, chunk: int) -> Haystack:
    line = trial.lines[start]
    return Haystack(model, torch.cat((trial.ids[:start], line, trial.ids[start + len(line) : end])), chunk)


def measure(arguments, model, tokenizer, trial: Trial, settings: dict[str, Recall | None], journal: Journal) -> None:
    places = [start for start in sorted(trial.places) if (trial.number, start) not in journal.found]
    if not places:
        return
    haystack = Haystack(model, trial.ids, arguments.chunk)
    windows = model.config.num_hidden_layers if arguments.reach is None else arguments.reach
    unverified = set(arguments.verify if trial.number == 0 else [])
    for start in tqdm(places, desc=f"text {trial.number}"):
        line, answer, hits = trial.lines[start], trial.answers[start], []
        kept = haystack.hide(line, start, windows * model.longpatch.config.local_branch)
        for length, depth in trial.places[start]:
            end = trial.end(start, length)
            behind = haystack.keep(end, length)
            haystack.cut(end)
            logits = {text: ask(model, haystack.cache, trial.question, answer, r) for text, r in settings.items()}
            haystack.restore(behind)
            for text, scores in logits.items():
                hits.append((length, depth, text, bool((scores.argmax(-1) == answer).all())))
                if arguments.show and not hits[-1][-1]:
                    said = tokenizer.decode(scores.argmax(-1))
                    tqdm.write(f"{length} tokens, depth {depth}, {text}: {said!r} for {tokenizer.decode(answer)!r}")
            if length in unverified and 0 < depth < arguments.depths // 2:
                unverified.remove(length)
                cache = whole(model, trial, start, end, arguments.chunk).cache
                for text, recall in settings.items():
                    gap = (ask(model, cache, trial.question, answer, recall) - logits[text]).abs().max()
                    tqdm.write(f"{length} tokens, depth {depth}, {text}: read whole, logits differ by {gap:.1e}")
        haystack.restore(kept)
        journal.add(trial.number, start, hits)


def main():
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model)
    window = arguments.window or model.config.max_position_embeddings
    settings = {text: None if text == "none" else Recall.parse(text) for text in arguments.recall}
    book = torch.tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False))
    convert_model(model, window, arguments.sinks, recall=NOTHING)
    journal, records = Journal(arguments.out), []
    for number in range(arguments.trials):
        measure(arguments, model, tokenizer, Trial(arguments, tokenizer, book, number), settings, journal)
    for (length, text), by_depth in sorted(journal.tally().items()):
        shown = [sum(hits) for _, hits in sorted(by_depth.items())]
        print(f"{length:>7} tokens, {text}: {sum(shown)} of {sum(map(len, by_depth.values()))}; by depth {shown}")
        arm = f"{window}/{arguments.sinks}" + ("" if text == "none" else f" recall {text}")
        for depth, hits in sorted(by_depth.items()):
            where = {"arm": arm, "length": length, "depth": depth / arguments.depths, "reach": arguments.reach}
            value = sum(hits) / len(hits)
            records.append(
                record(COMMAND, arguments.model, "found", value, "1", len(hits), seed=arguments.seed, **where)
            )
    if arguments.out:
        write_records(arguments.out, records)
        journal.path.unlink()


if __name__ == "__main__":
    main()
