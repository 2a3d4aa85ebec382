"""Passkeys with and without recall, by length and depth.

    python -m benchmarks.recall demo BOOK.txt --lengths 1024 4096 --recall none top_k=5
    python -m benchmarks.recall smollm2 BOOK.txt --window 1024 --lengths 4096 --depths 5 --trials 1 --recall none \\
        top_k=5,distance=512 top_k=20,distance=512

A trial is BOS, text of the book, the line with the key in place of as many tokens at some depth, text, the question. It
counts when all tokens of the key are the model's first choice one after the other, which is when greedy generation
writes them. Each setting of --recall is `none` or settings of `longpatch.Recall`.

All settings read a prompt once: what differs between them begins with the question. All depths share what lies before
the key; and what lies behind its reach, `layers * window` tokens further on, where Λ-attention cannot tell whether it
was there. --verify reads the first trial of each length whole and compares.
"""

import argparse
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from longpatch import LambdaCache, Recall, convert_model
from longpatch.evaluation.passkey import ANSWER_PREFIX, passkey_line
from longpatch.models import load_model
from longpatch.recall.blocks import BlockIndex
from longpatch.recall.settings import SEGMENT_TOKENS
from longpatch.results import record, write_records

COMMAND = "benchmarks.recall"
NOTHING = Recall(top_k=1 << 40)  # a memory, from which nothing is recalled


def parse_recall(text: str) -> Recall | None:
    """`none`, or settings such as top_k=5,distance=512,queries=None."""
    if text == "none":
        return None
    pairs = (setting.split("=") for setting in text.split(",") if setting != "default")
    return Recall(**{name: None if value == "None" else int(value) for name, value in pairs})


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `longpatch demo`")
    parser.add_argument("text", type=Path, help="UTF-8 text to hide the key in")
    parser.add_argument("--window", type=int, help="local_branch (default: the training length)")
    parser.add_argument("--sinks", type=int, default=4, help="global_branch")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of each prompt with its answer")
    parser.add_argument("--depths", type=int, default=20, help="places of the key, evenly from the sinks to the end")
    parser.add_argument("--trials", type=int, default=10, help="trials at each depth, each in another stretch of text")
    parser.add_argument("--recall", nargs="+", default=["none", "default"], metavar="SETTINGS")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per forward")
    parser.add_argument("--minutes", type=float, help="begin no stretch of text after so many minutes")
    parser.add_argument("--verify", action="store_true", help="read the first trial of each length whole and compare")
    parser.add_argument("--show", action="store_true", help="print what was said instead of each key not found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write the results here, after each stretch of text")
    return parser.parse_args()


@dataclass
class Snapshot:
    """The ring and the sinks of a cache, to come back to."""

    length: int
    layers: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, cache: LambdaCache) -> "Snapshot":
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers if layer.is_initialized]
        return cls(cache.get_seq_length(), layers)

    def restore(self, cache: LambdaCache) -> None:
        """The memory is cut, or lengthened over what it still holds, to the same number of tokens."""
        cache.length.fill_(self.length)
        cache.written.fill_(self.length)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()
        for memory in cache.memories():
            memory.lengths = [self.length - cache.config.global_branch]
            if memory.index is not None:
                memory.index.crop(0)


class Haystack:
    """One stretch of text, read once; keys are hidden in it one after the other."""

    def __init__(self, model, tokenizer, ids: Tensor, starts: list[int], chunk: int):
        """`ids` [n]: the prompt without its question; `starts`: where keys will be hidden."""
        self.model, self.tokenizer, self.ids, self.chunk = model, tokenizer, ids, chunk
        self.cache = LambdaCache(model.config)
        self.snapshots: dict[int, Snapshot] = {}
        for start in sorted({*starts, len(ids)}):
            self.read(self.cache, ids[self.cache.get_seq_length() : start])
            self.snapshots[start] = Snapshot.of(self.cache)

    @torch.no_grad()
    def read(self, cache: LambdaCache, ids: Tensor) -> None:
        for start in range(0, len(ids), self.chunk):
            self.model.base_model(ids[None, start : start + self.chunk], past_key_values=cache)

    def hide(self, line: Tensor, start: int) -> list:
        """Put `line` at token `start`; returns what `forget` needs to take it out again."""
        settings = self.model.longpatch.config
        reach = self.model.config.num_hidden_layers * settings.local_branch
        stop = min(len(self.ids), start + len(line) + reach)
        first = start - settings.global_branch  # the memory leaves out the sinks
        kept = [
            (segment.tensors, {name: tensor.clone() for name, tensor in segment.tensors.items()})
            for memory in self.cache.memories()
            for _, _, segment in memory.pieces(first, first + stop - start - 1, SEGMENT_TOKENS)
        ]
        self.snapshots[start].restore(self.cache)
        self.read(self.cache, torch.cat((line, self.ids[start + len(line) : stop])))
        if stop < len(self.ids):
            self.snapshots[len(self.ids)].restore(self.cache)
        return kept

    def forget(self, kept: list) -> None:
        """Take out what `hide` put in."""
        for tensors, copies in kept:
            for name, copy in copies.items():
                tensors[name].copy_(copy)

    def hidden_whole(self, line: Tensor, start: int) -> LambdaCache:
        cache = LambdaCache(self.model.config)
        self.read(cache, torch.cat((self.ids[:start], line, self.ids[start + len(line) :])))
        return cache


@torch.no_grad()
def ask(model, cache: LambdaCache, question: Tensor, answer: Tensor, recall: Recall | None) -> Tensor:
    """Logits [answer, V] of the answer's tokens under `recall`; the cache is as before afterwards.

    The answer's tokens are read in one forward, each recalling as it would when generated.
    """
    if recall is not None and recall.queries is not None:
        recall = replace(recall, queries=recall.queries + len(answer) - 1)
    settings = model.longpatch.config
    convert_model(model, settings.local_branch, settings.global_branch, recall=recall or NOTHING)
    cache.config = model.longpatch.config
    for memory in cache.memories():
        if recall is not None and memory.settings.block_tokens != recall.block_tokens:
            memory.settings = recall
            memory.index = BlockIndex(memory) if recall.block_tokens > 1 else None
    ids = torch.cat((question, answer[:-1]))
    logits = model(ids[None], past_key_values=cache).logits[0, -len(answer) :]
    cache.crop(-len(ids))
    return logits


def main():
    arguments = parse_arguments()
    began = time.perf_counter()
    model, tokenizer = load_model(arguments.model)
    window = arguments.window or model.config.max_position_embeddings
    settings = {text: parse_recall(text) for text in arguments.recall}
    book = torch.tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False))

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    question, records = encode(ANSWER_PREFIX), []
    for length in arguments.lengths:
        rng = random.Random(arguments.seed)
        found = {text: [[] for _ in range(arguments.depths)] for text in settings}
        for trial in tqdm(range(arguments.trials), desc=f"{length} tokens"):
            if arguments.minutes and time.perf_counter() - began > 60 * arguments.minutes:
                break
            keys = [f"{rng.randrange(10_000, 100_000)}" for _ in range(arguments.depths)]
            lines, answers = [encode(passkey_line(key)) for key in keys], [encode(f" {key}") for key in keys]
            size = length - len(question) - max(len(answer) for answer in answers)
            first = rng.randrange(len(book) - size)
            bos = book.new_tensor([tokenizer.bos_token_id])
            ids = torch.cat((bos, book[first : first + size - 1]))
            room = size - max(len(line) for line in lines)
            room -= arguments.sinks
            parts = max(1, arguments.depths - 1)
            starts = [arguments.sinks + round(room * depth / parts) for depth in range(arguments.depths)]
            convert_model(model, window, arguments.sinks, recall=NOTHING)
            haystack = Haystack(model, tokenizer, ids, starts, arguments.chunk)
            for depth, (line, start, answer) in enumerate(zip(lines, starts, answers, strict=True)):
                convert_model(model, window, arguments.sinks, recall=NOTHING)
                haystack.cache.config = model.longpatch.config
                kept = haystack.hide(line, start)
                for text, recall in settings.items():
                    logits = ask(model, haystack.cache, question, answer, recall)
                    first_choice = logits.argmax(-1)
                    found[text][depth].append(bool((first_choice == answer).all()))
                    if arguments.show and not found[text][depth][-1]:
                        said = tokenizer.decode(first_choice)
                        tqdm.write(f"{length} tokens, depth {depth}, {text}: {said!r} for {tokenizer.decode(answer)!r}")
                if arguments.verify and trial == 0 and depth == arguments.depths // 2:
                    convert_model(model, window, arguments.sinks, recall=NOTHING)
                    whole = ask(model, haystack.hidden_whole(line, start), question, answer, recall)
                    print(f"{length} tokens read whole: logits differ by {(whole - logits).abs().max():.1e}")
                haystack.forget(kept)
                tqdm.write(f"{length} {depth} " + " ".join(f"{text}:{sum(map(sum, found[text]))}" for text in settings))
        for text in settings:
            shown = [sum(hits) for hits in found[text]]
            count = sum(map(len, found[text]))
            print(f"{length:>7} tokens, {text}: {sum(shown)} of {count}; by depth {shown}", flush=True)
            common = {"recall": text, "length": length, "window": window, "sinks": arguments.sinks}
            values = [(common, sum(shown), count)]
            values += [({**common, "depth": depth}, sum(hits), len(hits)) for depth, hits in enumerate(found[text])]
            records += [
                record(COMMAND, arguments.model, "passkey_accuracy", hits / n, "1", n, seed=arguments.seed, **where)
                for where, hits, n in values
                if n
            ]
        if arguments.out:
            write_records(arguments.out, records)


if __name__ == "__main__":
    main()
