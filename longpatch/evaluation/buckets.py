"""Perplexities of documents: whole, by document length, and by tokens read so far."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Perplexity of a group of tokens in each arm; `by` tells what groups them, in [start, stop) tokens."""

    by: str
    start: int
    stop: int
    tokens: int
    perplexity: dict[str, float]  # exp of the mean NLL
    chunk_mean: dict[str, float]  # token-weighted mean of the perplexities of chunks, as Temp-LoRA's own code reports

    def gain(self, arm: str, baseline: str) -> float:
        """By which share of the baseline's perplexity an arm is below it."""
        return 1 - self.perplexity[arm] / self.perplexity[baseline]


Scores = dict[str, list[Tensor]]  # arm: NLL [tokens] of each chunk; nan = unscored


def bucket(by: str, start: int, stop: int, documents: Sequence[Scores]) -> Bucket:
    """One bucket of all chunks given."""
    perplexity, chunk_mean, tokens = {}, {}, 0
    for arm in documents[0]:
        chunks = [scored for document in documents for chunk in document[arm] if len(scored := chunk[~chunk.isnan()])]
        everything = torch.cat(chunks).double()
        tokens = len(everything)
        perplexity[arm] = everything.mean().exp().item()
        weighted = sum(len(chunk) * chunk.double().mean().exp().item() for chunk in chunks)
        chunk_mean[arm] = weighted / tokens
    return Bucket(by, start, stop, tokens, perplexity, chunk_mean)


def by_length(documents: Sequence[Scores], edges: Sequence[int]) -> Iterator[Bucket]:
    """Whole documents grouped by how long they are, at `edges` in tokens; groups without documents are left out."""
    groups: dict[int, list[Scores]] = {}
    for document in documents:
        length = sum(len(chunk) for chunk in next(iter(document.values())))
        groups.setdefault(sum(length >= edge for edge in edges), []).append(document)
    limits = [0, *edges]
    for index in sorted(groups):
        longest = max(sum(len(chunk) for chunk in next(iter(document.values()))) for document in groups[index])
        stop = edges[index] if index < len(edges) else longest + 1
        yield bucket("document length", limits[index], stop, groups[index])


def by_position(
    documents: Sequence[Scores], size: int, chunk_tokens: int, start: int = 0, end: int | None = None
) -> Iterator[Bucket]:
    """Tokens of all documents grouped by how many were read before them; chunks are cut at the edges of buckets."""
    whole = [{arm: torch.cat(chunks) for arm, chunks in document.items()} for document in documents]
    longest = max(len(next(iter(document.values()))) for document in whole)
    end = longest if end is None else min(end, longest)
    for left in range(start, end, size):
        right = min(left + size, end)
        cut = [
            {arm: _chunks(nll, left, right, chunk_tokens) for arm, nll in document.items()}
            for document in whole
            if len(next(iter(document.values()))) > left
        ]
        if cut and any(not chunk.isnan().all() for chunk in next(iter(cut[0].values()))):
            yield bucket("tokens read", left, right, cut)


def _chunks(nll: Tensor, left: int, right: int, chunk_tokens: int) -> list[Tensor]:
    edges = [left, *range((left // chunk_tokens + 1) * chunk_tokens, right, chunk_tokens), right]
    return [nll[a:b] for a, b in pairwise(edges) if len(nll[a:b])]
