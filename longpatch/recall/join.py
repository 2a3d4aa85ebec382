"""Recalled tokens join the softmax: two partial results over disjoint keys merge exactly by their log-sum-exp."""

from typing import Any

import torch
from torch import Tensor

from longpatch_kernels.compose import merge

from ..rope import rotate
from . import search
from .memory import Memory


def join(out: Tensor, lse: Tensor, query: Tensor, memory: Memory, step: Any, scale: float) -> Tensor:
    """`out` [B, Hq, n, d] with what the last queries recall; `query` [B, Hq, n, d] rotated as the model did.

    `step` is the forward's `longpatch.step.Step`.
    """
    lookup = step.lookup
    memory.recalled = None
    if not lookup.possible:
        return out
    count = lookup.first.shape[1]
    turned = rotate(query[:, :, -count:], lookup.query_phase)
    recalled = search.attend(memory, turned, lookup, scale)
    merged, _ = merge(out[:, :, -count:], lse[:, :, -count:], *recalled)
    return merged if count == out.shape[2] else torch.cat((out[:, :, :-count], merged), dim=2)


def passing_memory(key: Tensor, value: Tensor, step: Any) -> Memory:
    """A memory of one forward without cache, whose keys and values [B, Hkv, n, d] are all there is."""
    memory = Memory(step.config.recall, step.config.local_branch)
    memory.append(rotate(key.detach(), step.lookup.key_phase), value.detach(), step.lookup.starts)
    return memory
