"""Negative log-likelihood of a text: streamed to any length, or in fresh windows as the reference."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

MIB = 2**20


@dataclass(frozen=True)
class Chunk:
    """What reading one chunk of a text gave."""

    start: int  # tokens read before this chunk
    nll: Tensor  # [tokens], nats for the tokens after each one read
    seconds: float
    cache: Cache | None  # as it stands after this chunk

    @property
    def cache_bytes(self) -> int:
        return cache_bytes(self.cache)


def stream_nll(model, ids: Tensor, chunk_tokens: int = 512, cache: Cache | None = None) -> Iterator[Chunk]:
    """Read `ids` [n] chunk by chunk with one kept cache; yields the NLL of ids[1:], n - 1 values in all.

    On a converted model memory stays constant, on any other the cache grows with the text. `cache` holds what was read
    before `ids`.
    """
    for start in range(0, len(ids) - 1, chunk_tokens):
        began = time.perf_counter()
        inputs = ids[start : start + chunk_tokens]
        targets = ids[start + 1 : start + chunk_tokens + 1]
        with torch.no_grad():
            output = model(input_ids=inputs[None].to(model.device), past_key_values=cache, use_cache=True)
            nll = cross_entropy(output.logits[0, : len(targets)].float(), targets.to(model.device), reduction="none")
        cache = output.past_key_values
        yield Chunk(start, nll.cpu(), time.perf_counter() - began, cache)


def window_nll(model, ids: Tensor, window: int, bos: int | None, batch: int = 16) -> Iterator[Tensor]:
    """NLL of ids[1:], `ids` [n] cut into windows of `window` tokens that know nothing of each other, in batches.

    One place of each window is taken by `bos`, or by the token before it where there is no BOS: every token is scored.
    """
    starts = range(1, len(ids), window - 1)
    cut = [ids[start - 1 : start - 1 + window].clone() for start in starts]
    if bos is not None:
        for piece in cut:
            piece[0] = bos
    full, tail = [piece for piece in cut if len(piece) == window], [piece for piece in cut if len(piece) < window]
    for rows in [full[i : i + batch] for i in range(0, len(full), batch)] + [[piece] for piece in tail]:
        inputs = torch.stack(rows).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        yield cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none").cpu()


@dataclass(frozen=True)
class Scores:
    """Of some tokens, [tokens] each: NLL in nats, and whether the token was the model's first choice."""

    nll: Tensor
    correct: Tensor


def sliding_scores(
    model, ids: Tensor, length: int, stride: int, context: int | None = None, new_only: bool = True
) -> Iterator[Scores]:
    """Scores of windows of `length` predicted tokens of `ids` [n], each beginning `stride` after the last.

    With `new_only` a window scores only what no earlier one did, and the last, shorter one ends the text: the usual
    strided perplexity. Without, every full window scores all its tokens (LongQLoRA, arXiv 2311.04879).
    `context`: a window is read in parts of so many tokens that do not see each other.
    """
    scored, context = 0, context or length
    for start in range(0, max(1, len(ids) - 1), stride):
        stop = min(start + length, len(ids) - 1)
        if not new_only and start and stop - start < length:
            break
        parts = []
        for first in range(start, stop, context):
            inputs = ids[first : min(first + context, stop)].to(model.device)
            targets = ids[first + 1 : first + 1 + len(inputs)].to(model.device)
            with torch.no_grad():
                logits = model(input_ids=inputs[None], use_cache=False).logits[0].float()
            parts.append((cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets))
        nll, correct = (torch.cat(columns).cpu() for columns in zip(*parts, strict=True))
        known = max(0, scored - start) if new_only else 0
        yield Scores(nll[known:], correct[known:])
        scored = stop
        if new_only and stop == len(ids) - 1:
            break


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds, what recall remembers included."""
    layers = [] if cache is None else [layer for layer in cache.layers if layer.is_initialized]
    memories = [memory for layer in layers if (memory := getattr(layer, "memory", None)) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) + sum(m.nbytes for m in memories)


def perplexity(nll: Tensor) -> float:
    """exp of the mean NLL in nats."""
    return nll.mean().exp().item()


def bits_per_byte(nll: Tensor, text_bytes: int) -> float:
    """Total information of the text under the model, per byte of the text: comparable between tokenizers."""
    return nll.double().sum().item() / text_bytes / torch.log(torch.tensor(2.0)).item()
