"""What the last tokens of a text cost a model: in one forward, or after a context that is read once."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def scored_tokens(ids: Tensor, count: int, mask: Tensor | None, loss_mask: Tensor | None) -> Tensor:
    """Which of the last `count` tokens teach, [rows, count]: those that are there, allowed, and follow a token."""
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    follows = torch.zeros_like(there)
    follows[:, 1:] = there[:, :-1]
    scored = (there & follows)[:, ids.shape[1] - count :]
    return scored if loss_mask is None else scored & loss_mask.to(scored.device).bool()


def whole(model: Any, ids: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """NLL [rows, count] of the last `count` of `ids` in one forward; nan for a token that nothing precedes."""
    positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
    keep = min(count + 1, ids.shape[1])
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
    ).logits[:, :-1]
    nll = nll_of(logits, ids[:, ids.shape[1] - keep + 1 :])
    if keep == count:
        nll = torch.cat((nll.new_full((len(ids), 1), torch.nan), nll), dim=1)
    return nll


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Of `targets` [rows, n] under `logits` [rows, n, V], in nats and float32."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def detached(model: Any, ids: Tensor, count: int, mask: Tensor | None) -> Callable[[], Tensor]:
    """A function that gives the same NLL as often as it is asked; the context's keys and values are computed once.

    No gradient flows into them. There must be two tokens of context at least.
    """
    context = ids.shape[1] - count
    positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp_min(0)
    first, rest = slice(0, context - 1), slice(context - 1, ids.shape[1] - 1)
    with torch.no_grad():
        cache = model(
            input_ids=ids[:, first],
            attention_mask=None if mask is None else mask[:, first],
            position_ids=None if positions is None else positions[:, first],
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values

    def continued() -> Tensor:
        output = model(
            input_ids=ids[:, rest],
            attention_mask=None if mask is None else mask[:, :-1],
            position_ids=None if positions is None else positions[:, rest],
            past_key_values=deepcopy(cache),
            use_cache=True,
        )
        return nll_of(output.logits, ids[:, context:])

    return continued
