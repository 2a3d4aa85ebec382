"""Long prompts that differ in one line, read together: what they share is read once."""

from dataclasses import replace

import torch
from torch import Tensor

from longpatch import LambdaCache, Recall, convert_model
from longpatch.recall.blocks import BlockIndex
from longpatch.recall.settings import SEGMENT_TOKENS
from longpatch.rope import rotate

NOTHING = Recall(top_k=1 << 40)  # a memory, from which nothing is recalled


class Haystack:
    """One text in the cache of a converted model; a line is put in and taken out again, the text cut where one likes.

    Recall's memory holds every token that was read, so the cache as it was after any of them can be had back.
    """

    def __init__(self, model, ids: Tensor, chunk: int):
        """`ids` [n]: the text, BOS first; `chunk` tokens are read per forward."""
        self.model, self.ids, self.chunk = model, ids, chunk
        self.cache = LambdaCache(model.config)
        self.read(ids)

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        for start in range(0, len(ids), self.chunk):
            self.model.base_model(ids[None, start : start + self.chunk], past_key_values=self.cache)

    def cut(self, length: int) -> None:
        """The cache as it was, or would have been, after `length` tokens of what it remembers."""
        sinks, rotary = self.cache.config.global_branch, self.model.longpatch.rotary
        self.cache.length.fill_(length)
        self.cache.written.fill_(length)
        for layer in self.cache.layers:
            first = max(0, length - layer.ring_size)
            positions = torch.arange(first, length)[None]
            keys, values = (
                torch.cat(
                    (of_sinks[:, :, first:], *self._remembered(layer.memory, name, max(first, sinks), length)), dim=2
                )
                for name, of_sinks in (("keys", layer.sink_keys), ("values", layer.sink_values))
            )
            layer._write(rotate(keys, rotary.phase(positions)), values, first)
            layer.memory.lengths = [length - sinks]
            if layer.memory.index is not None:
                layer.memory.index.crop(0)

    def _remembered(self, memory, name: str, first: int, stop: int):
        """Views of `name` of tokens `first` to `stop`."""
        sinks = self.cache.config.global_branch  # the memory leaves them out
        for start, end, segment in memory.pieces(first - sinks, stop - sinks - 1, SEGMENT_TOKENS):
            place = start % SEGMENT_TOKENS
            yield segment.tensors[name][:, :, place : place + end - start]

    def hide(self, line: Tensor, start: int, reach: int) -> list[tuple[Tensor, Tensor]]:
        """Put `line` in place of the tokens from `start`, and read the `reach` tokens that follow it anew.

        Returns what `restore` needs to take it out again.
        """
        stop = min(len(self.ids), start + len(line) + reach)
        kept = self.keep(start, stop)
        self.cut(start)
        self.read(torch.cat((line, self.ids[start + len(line) : stop])))
        return kept

    def keep(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """What is remembered of tokens `start` to `stop`, for `restore`."""
        views = [
            view
            for memory in self.cache.memories()
            for name in ("keys", "values")
            for view in self._remembered(memory, name, start, min(stop, len(self.ids)))
        ]
        return [(view, view.clone()) for view in views]

    @staticmethod
    def restore(kept: list[tuple[Tensor, Tensor]]) -> None:
        for view, copy in kept:
            view.copy_(copy)


@torch.no_grad()
def ask(model, cache: LambdaCache, question: Tensor, answer: Tensor, recall: Recall | None) -> Tensor:
    """Logits [answer, V] of the answer's tokens under `recall`; the cache is as before afterwards.

    The answer's tokens are read in one forward, each recalling as it would when generated.
    """
    if recall is not None and recall.queries is not None:
        recall = replace(recall, queries=recall.queries + len(answer) - 1)
    settings = model.longpatch.config
    before = cache.config
    convert_model(model, settings.local_branch, settings.global_branch, recall=recall or NOTHING)
    cache.config = model.longpatch.config
    for memory in cache.memories():
        if recall is not None and memory.settings.block_tokens != recall.block_tokens:
            memory.settings = recall
            memory.index = BlockIndex(recall.block_tokens) if recall.block_tokens > 1 else None
    ids = torch.cat((question, answer[:-1]))
    logits = model(ids[None], past_key_values=cache).logits[0, -len(answer) :]
    cache.crop(-len(ids))
    convert_model(model, settings.local_branch, settings.global_branch, recall=NOTHING)
    cache.config = before
    return logits
