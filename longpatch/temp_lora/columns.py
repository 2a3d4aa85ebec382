"""Which tokens of a text the columns of `generate`'s cache are, once it was built anew."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..cache import LambdaCache
from ..errors import LongpatchError
from .checkpoint import empty_cache
from .visible import Visible


class Columns:
    """A cache of `generate`, which knows of no gap between sinks and latest tokens.

    Attributes:
        shift: tokens of the text that the cache has no columns for; None while generate's own arguments hold.
        mask: [rows, w] of the columns it was built with; None = nothing masked.

    Raises:
        LongpatchError: for a cache that cannot be built anew in place.
    """

    def __init__(self, cache: Any):
        if not isinstance(cache, LambdaCache) and type(cache) is not DynamicCache:
            reason = f"a cache of type {type(cache).__name__}"
            raise LongpatchError("TempLoraGenerator.generate", [reason], "the default cache")
        self.cache = cache
        self.shift: int | None = None
        self.mask: Tensor | None = None

    @torch.no_grad()
    def build(self, model: Any, seen: Visible, count: int) -> None:
        """Read what is visible of a text of `count` tokens, but for its last one, into the emptied cache."""
        ids, mask = seen.ids[:, :-1], None if seen.mask is None else seen.mask[:, :-1]
        if isinstance(self.cache, LambdaCache):
            self.cache.reset()
        else:
            fresh: Any = empty_cache(model)
            self.cache.layers = fresh.layers
        positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
        if ids.shape[1]:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.mask, self.shift = mask, count - seen.ids.shape[1]

    def arguments(self, kwargs: dict[str, Any], text: Tensor) -> dict[str, Any]:
        """Of a forward: the tokens of `text` [rows, n] that the cache lacks, its mask, positions that go on from it."""
        if self.shift is None:
            return kwargs
        past = self.cache.get_seq_length()
        inputs = text[:, past + self.shift :].to(kwargs["input_ids"].device)
        total = past + inputs.shape[1]
        columns = torch.arange(past, total, device=inputs.device)[None]
        if self.mask is None:
            mask, positions = None, columns
        else:
            ones = self.mask.new_ones(len(self.mask), total - self.mask.shape[1])
            mask = torch.cat((self.mask, ones), dim=1)
            positions = columns - (self.mask == 0).sum(dim=1)[:, None]
        fitted = {"input_ids": inputs, "attention_mask": mask, "position_ids": positions}
        return kwargs | {name: value for name, value in fitted.items() if name != "position_ids" or name in kwargs}
