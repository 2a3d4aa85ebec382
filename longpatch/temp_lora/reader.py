"""A model's cache over a long text: kept for some chunks, then built anew from what is visible."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

from .checkpoint import cache_state, empty_cache, layer_devices, restore_cache
from .visible import sinks_of, visible


class Reader:
    """Scores one text chunk by chunk.

    Args:
        model: a causal language model.
        tokens: latest tokens that a cache built anew holds, behind the sinks of a converted model.
        reuse_chunks: chunks to read before the cache is built anew; None = never.
    """

    def __init__(self, model: Any, tokens: int, reuse_chunks: int | None = 1):
        self.model, self.tokens, self.reuse_chunks = model, tokens, reuse_chunks
        self.cache: Cache | None = None
        self.age = 0

    @torch.no_grad()
    def score(self, ids: Tensor, start: int, stop: int) -> Tensor:
        """NLL [stop - start] in nats of tokens `start` to `stop` of `ids` [n]; nan for token 0.

        Call it with spans that follow each other. The cache ends before the token that predicts the span's first one.
        """
        inputs = ids[None, max(0, start - 1) : stop - 1]
        if self.cache is None or (self.reuse_chunks is not None and self.age >= self.reuse_chunks):
            seen = visible(ids[None, :start], None, self.tokens, sinks_of(self.model)).ids
            inputs = torch.cat((seen, ids[None, start : stop - 1]), dim=1)
            self.cache = None if self.reuse_chunks == 1 else empty_cache(self.model)
            self.age = 0
        first = max(1, start)
        logits = self.model(
            input_ids=inputs.to(self.model.device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=stop - first,
        ).logits[0]
        self.age += 1
        nll = cross_entropy(logits.float(), ids[first:stop].to(logits.device), reduction="none")
        return torch.cat((nll.new_full((first - start,), torch.nan), nll))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, data = cache_state(self.cache)
        return tensors, {"cache": data, "age": self.age}

    def load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        self.age, self.cache = data["age"], None
        if data["cache"] is not None:
            self.cache = empty_cache(self.model)
            restore_cache(self.cache, tensors, data["cache"], layer_devices(self.model, len(self.cache.layers)))
